"""Finish a grown or transferred checkpoint: text or images, schedules, unfreezing, the run and its curve."""
