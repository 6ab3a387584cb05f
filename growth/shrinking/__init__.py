"""The verb `shrink`: which layers and units stay, how that is found, and what becomes of the others."""
