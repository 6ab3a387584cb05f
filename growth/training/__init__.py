"""Finish a grown or transferred checkpoint: windows of text, schedules, unfreezing, the run and its curve."""
