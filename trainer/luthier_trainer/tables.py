"""What transformers builds at the first model that is loaded, and keeps: the trainer host imports this, so that its
trainers find it built. No tensor is touched here, as the host may touch none."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # type: ignore[no-untyped-call]
"""A thousand patterns of the names of weights are compiled: 0.1 s."""
