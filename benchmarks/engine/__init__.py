"""Luthier's engine against TRL on the same rows, and against what the processor can do."""
