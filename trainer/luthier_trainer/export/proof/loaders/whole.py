"""Whole models, by transformers alone: nothing is taken from the tuned model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier_trainer.export.proof.artefact import Artefact, Loader, NotLoaded
from luthier_trainer.export.proof.loaders.computing import TorchArtefact, Words, first_line, generation_ends
from luthier_trainer.export.proof.settings import require_same_config
from luthier_trainer.model import no_progress_bar
from luthier_trainer.quantization import keep_differentiable

LOADER = Loader("transformers", transformers.__version__)


@contextlib.contextmanager
def load(exported: Path, base: Path) -> Iterator[Artefact]:
    """The model, computed in 32 bits whatever its weights are held in, so that what differs is the weights' rounding
    alone. `base`: whose configuration it must have. Raises NotLoaded."""
    words = Words(exported)
    require_same_config(base, exported)
    model = load_weights(exported)
    yield TorchArtefact(model, words, generation_ends(model))


def load_weights(folder: Path) -> PreTrainedModel:
    """A directory's model in 32 bits. Raises NotLoaded, also where weights are lacking: transformers makes those up."""
    try:
        with no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise NotLoaded(first_line(error)) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise NotLoaded(f"it has no weights for {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))
    whole: PreTrainedModel = model
    if getattr(whole, "is_quantized", False):
        keep_differentiable(whole)  # the products that bitsandbytes packs weights for round to bfloat16
        for each in whole.parameters():
            if each.is_floating_point():
                each.data = each.data.float()
    return whole
