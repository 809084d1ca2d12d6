"""Benchmarks of Luthier against its peers and its own aims: `python -m benchmarks`."""
