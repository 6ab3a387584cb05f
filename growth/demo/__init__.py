"""The main job, end to end, on real text that every machine has: train, grow, transfer, train on, compare."""

from growth.demo.job import run

__all__ = ["run"]
