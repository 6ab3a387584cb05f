"""Move a trained transformer to another architecture: what they share is copied, the rest starts fresh."""

from growth.transfer.xatl import transfer

__all__ = ["transfer"]
