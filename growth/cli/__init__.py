"""The command line, a file for each verb; torch is imported when one runs, not for --help."""
