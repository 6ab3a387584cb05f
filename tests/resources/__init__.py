"""Proofs and predictions from machine code, on a machine without a GPU."""
