"""Tuned models on disk, as the trainer leaves them, without a training."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from fidelity.tiny import with_lora
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.v1 import export_task_pb2
from luthier_trainer import inspect
from luthier_trainer.export.merged import write_merged
from luthier_trainer.export.source import Tuned
from luthier_trainer.stop import never

IDS = torch.arange(5, 45)[None]
F32 = export_task_pb2.MergedExport(weights=export_task_pb2.WEIGHT_TYPE_F32)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def tuned(folder: Path, base: PreTrainedModel, *, shard: str = "1GB", **kind: Any) -> Tuned:
    """The base, in files of at most `shard`, and an adapter on it whose every number matters, below `folder`. `kind`:
    as of `with_lora`."""
    base.save_pretrained(folder / "base", max_shard_size=shard)
    model = folder / "model"
    model.mkdir()
    for name in TOKENIZER:
        shutil.copy(inspect.BUILTIN / "tiny" / name, model / name)
        shutil.copy(inspect.BUILTIN / "tiny" / name, folder / "base" / name)
    trained = with_lora(base, **kind)
    assert trained.peft is not None
    torch.manual_seed(3)
    for name, each in trained.peft.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(each, std=0.1)
        elif "lora_embedding_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(each, std=0.2)
        elif "magnitude" in name:
            each.data.mul_(1 + 0.1 * torch.rand_like(each))
    state = get_peft_model_state_dict(trained.peft, save_embedding_layers=False)
    state = {name: each.contiguous().clone() for name, each in state.items()}
    save_file(state, model / "adapter_model.safetensors", metadata={"format": "pt"})
    trained.peft.peft_config["default"].save_pretrained(str(model))
    (model / "luthier.json").write_text(json.dumps({"format": 1, "model_id": "model_1"}))
    return Tuned(model, folder / "base", model, "model_1", "builtin/tiny")


def merged(source: Tuned, folder: Path, options: export_task_pb2.MergedExport = F32) -> Path:
    """The merged model's directory."""
    folder.mkdir()
    write_merged(source, options, folder, lambda _done, _total: None, never)
    return folder


def peft_logits(source: Tuned) -> torch.Tensor:
    """What the base and the adapter give through PEFT."""
    assert source.adapter is not None
    base = AutoModelForCausalLM.from_pretrained(source.base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, str(source.adapter)))


def logits(model: nn.Module) -> torch.Tensor:
    """The model's answer to the same tokens each time."""
    with torch.no_grad():
        found: torch.Tensor = model.train(False)(input_ids=IDS).logits
    return found


def loaded_logits(folder: Path) -> torch.Tensor:
    """The answer of a model that transformers loads, of which no weight may be missing or left over."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, told = loaded
    assert not any(told.values()), told
    return logits(model)
