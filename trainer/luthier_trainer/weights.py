"""What is trained, as files that PEFT and transformers load."""

from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from luthier_trainer.masters import Masters
from luthier_trainer.model import Trained, no_progress_bar


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


def _write_adapter(peft: PeftModel, state: dict[str, torch.Tensor], folder: Path) -> None:
    """`PeftModel.save_pretrained` without its model card, and without asking the hub for the size of the vocabulary."""
    tensors = get_peft_model_state_dict(peft, state_dict=state, save_embedding_layers=False)
    tensors = {name: each.contiguous().clone() for name, each in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft.peft_config["default"]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
