"""Adapters, by PEFT on the base that they were trained on."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
from peft import PeftModel
from safetensors import SafetensorError
from transformers import GenerationConfig

from luthier_trainer.export.proof.artefact import Artefact, Loader, NotLoaded
from luthier_trainer.export.proof.loaders.computing import TorchArtefact, Words, first_line, generation_ends
from luthier_trainer.export.proof.loaders.whole import load_weights
from luthier_trainer.model import inside

LOADER = Loader("peft", peft.__version__)


@contextlib.contextmanager
def load(exported: Path, base: Path) -> Iterator[Artefact]:
    """The adapter on its base, in 32 bits. It ends where its own generation settings and tokenizer say, or where it has
    none, those of the base. Raises NotLoaded."""
    words = Words(exported)
    plain = load_weights(base)
    try:
        if (exported / "generation_config.json").is_file():
            plain.generation_config = GenerationConfig.from_pretrained(exported, local_files_only=True)
        with warnings.catch_warnings():
            # PEFT 0.21 on transformers 5.23.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # A tensor that the adapter's settings ask for and its file lacks stays as it was drawn.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(plain, str(exported))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, UserWarning, SafetensorError) as error:
        raise NotLoaded(first_line(error)) from error
    model = inside(adapted)
    yield TorchArtefact(model, words, generation_ends(plain) | words.eos, adapted)
