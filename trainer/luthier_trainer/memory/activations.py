"""Activation checkpointing: a layer keeps its input alone, and computes the rest again in the backward pass (Chen et
al. 2016, arXiv 1604.06174)."""

import functools

import torch.utils.checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier_trainer.memory.layers import decoder_layers


def can_checkpoint(model: PreTrainedModel) -> bool:
    """Whether each of the model's decoder layers knows how."""
    layers = decoder_layers(model)
    return bool(layers) and all(isinstance(each, GradientCheckpointingLayer) for each in layers)


def checkpoint_layers(model: PreTrainedModel, wanted: bool, *, keep_randomness: bool = True) -> None:
    """Switches activation checkpointing of every decoder layer. It works in training alone and changes no number: the
    second pass computes what the first one did, dropout with the same draws.

    `keep_randomness`: whether the random state is noted for that; only a trace has no need to.
    """
    again = functools.partial(
        torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=keep_randomness
    )
    for layer in decoder_layers(model):
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = wanted
            layer._gradient_checkpointing_func = again  # type: ignore[assignment]
