"""Luthier's engine against its peers on a CUDA device, on Llamas of 1 and 8 billion random weights."""
