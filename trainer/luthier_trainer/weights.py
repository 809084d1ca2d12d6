"""What is trained, as files that PEFT and transformers load."""

from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from luthier_trainer.masters import Masters
from luthier_trainer.model import Trained, no_progress_bar

ADAPTER = "adapter_model.safetensors"


def write_weights(trained: Trained, masters: Masters, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes an adapter in PEFT's format or a whole model in transformers', trained weights in 32 bits, and the
    tokenizer with its chat template."""
    state = masters.state_dict(trained.root)
    if trained.peft is not None:
        _write_adapter(trained.peft, state, folder)
    else:
        with no_progress_bar():
            trained.causal_lm.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def read_weights(trained: Trained, masters: Masters, folder: Path) -> None:
    """Takes up the trained weights of a directory that `write_weights` wrote for the same model, bit by bit."""
    device = masters.values.device
    if trained.peft is not None:
        views = masters.state_dict(trained.root, copy=False)
        targets = get_peft_model_state_dict(trained.peft, state_dict=views, save_embedding_layers=False)
        found = load_file(folder / ADAPTER)
        for name, target in targets.items():
            target.copy_(found[name].to(device))
    else:
        # transformers may write weights under other names than it computes with.
        saved = type(trained.causal_lm).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        named = dict(saved.named_parameters())
        for name, view in masters.named(masters.values):
            view.copy_(named[name].to(device))
    masters.publish()


def _write_adapter(peft: PeftModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    """`PeftModel.save_pretrained` without its model card, and without asking the hub for the size of the vocabulary."""
    tensors = get_peft_model_state_dict(peft, state_dict=state, save_embedding_layers=False)
    tensors = {name: each.contiguous().clone() for name, each in tensors.items()}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    config = peft.peft_config["default"]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
