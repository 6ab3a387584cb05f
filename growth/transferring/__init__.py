"""Move a trained transformer to another architecture: what they share is copied, the rest starts fresh."""
