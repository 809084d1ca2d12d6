"""The base model and what is trained in it."""

import contextlib
import difflib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier.v1 import job_pb2
from luthier_trainer import durable
from luthier_trainer.config import LoraSettings
from luthier_trainer.errors import TrainingError
from luthier_trainer.layers import train_last
from luthier_trainer.quantization import keep_differentiable

ALL_LINEAR = "all-linear"
_INIT: dict[job_pb2.LoraInit.ValueType, bool | Literal["gaussian", "orthogonal"]] = {
    job_pb2.LORA_INIT_KAIMING: True,
    job_pb2.LORA_INIT_GAUSSIAN: "gaussian",
    job_pb2.LORA_INIT_ORTHOGONAL: "orthogonal",
}


@dataclass(frozen=True)
class Trained:
    """A model ready for training: `causal_lm` computes, with the adapters inside; `peft` wraps it, or is None when
    every weight is trained. `base_parameters` counts weights without adapters."""

    causal_lm: PreTrainedModel
    peft: PeftModel | None
    base_parameters: int
    revision: str

    @property
    def root(self) -> nn.Module:
        """The module that holds everything."""
        return self.peft if self.peft is not None else self.causal_lm

    @property
    def target_modules(self) -> list[str]:
        """The last names of what carries an adapter: modules, and the parameters of experts, which are no modules."""
        return sorted(
            {_adapted(name, each) for name, each in self.causal_lm.named_modules() if hasattr(each, "lora_A")}
        )

    @property
    def trained_parameters(self) -> int:
        """Weights that are trained."""
        return sum(each.numel() for each in self.root.parameters() if each.requires_grad)


def load_tokenizer(source: BaseModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of the adapter when one is continued and brings its own, else the base's."""
    adapter = Path(source.adapter_dir) if source.adapter_dir else None
    own = adapter is not None and (adapter / "tokenizer_config.json").exists()
    location = str(adapter) if own else source.location
    revision = (source.revision or None) if source.is_hub and not own else None
    with _not_found(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location, revision=revision, trust_remote_code=False, local_files_only=own or not source.is_hub
        )
    return tokenizer


def load_config(source: BaseModelSource) -> object:
    """The base model's configuration, without its weights."""
    with _not_found(source):
        return AutoConfig.from_pretrained(
            source.location,
            revision=(source.revision or None) if source.is_hub else None,
            trust_remote_code=False,
            local_files_only=not source.is_hub,
        )


def load_base(
    source: BaseModelSource,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The base's weights on the device; accelerate places them there tensor by tensor, without a second copy in memory.

    `attention`: `auto`, `sdpa` or `eager`; `quantization`: how linear weights are held, None for as they are. Raises
    TrainingError MODEL_NOT_FOUND.
    """
    with _not_found(source), no_progress_bar():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=(source.revision or None) if source.is_hub else None,
            dtype=dtype,
            device_map={"": str(device)},
            attn_implementation=None if attention == "auto" else attention,
            quantization_config=quantization,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=not source.is_hub,
        )
    if quantization is not None:
        keep_differentiable(model)
    return model


def prepare(
    base: PreTrainedModel,
    source: BaseModelSource,
    lora: LoraSettings | None,
    *,
    name: str,
    seed: int,
    resume_from: Path | None,
    last_layers: int = 0,
) -> Trained:
    """Makes what is trained trainable. With `lora`: the adapter of a checkpoint, the one that is continued, or a new
    one whose start depends on the seed alone. Without: every weight, or those of the `last_layers` (0: all) layers, a
    continued adapter merged first.

    `name` is what the adapter's configuration calls its base. Raises TrainingError MODULE_NOT_FOUND,
    ADAPTER_UNSUPPORTED.
    """
    parameters = base.num_parameters()
    revision = getattr(base.config, "_commit_hash", None) or ""
    adapter_dir = source.adapter_dir
    if lora is None:
        if adapter_dir and resume_from is None:
            with _peft_on_this_transformers():
                base = PeftModel.from_pretrained(base, adapter_dir).merge_and_unload()
        base.requires_grad_(True)
        if last_layers:
            train_last(base, last_layers)
        return Trained(base, None, parameters, revision)
    if resume_from is not None or adapter_dir:
        with _peft_on_this_transformers():
            peft = PeftModel.from_pretrained(base, str(resume_from or adapter_dir), is_trainable=True)
        _widen(peft, str(resume_from or adapter_dir))
        return Trained(inside(peft), peft, parameters, revision)
    _check_names(base, "target_modules", [each for each in lora.target_modules if each != ALL_LINEAR])
    _check_names(base, "modules_to_save", lora.modules_to_save)
    base.name_or_path = name  # PEFT writes the model's own name over the configuration's
    torch.manual_seed(seed)
    everything = ALL_LINEAR in lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if everything else list(lora.target_modules),
        modules_to_save=list(lora.modules_to_save) or None,
        fan_in_fan_out=any(isinstance(each, Conv1D) for each in base.modules()),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=_INIT[lora.init],
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )
    with _peft_on_this_transformers():
        try:
            peft = get_peft_model(base, config)
        except ValueError as error:
            raise TrainingError(
                "ADAPTER_UNSUPPORTED",
                f"PEFT has no such adapter for this model: {error}".splitlines()[0],
                "Set the dropout to 0 if it speaks of dropout; else name other target_modules.",
            ) from error
    return Trained(inside(peft), peft, parameters, revision)


def _adapted(name: str, layer: nn.Module) -> str:
    """What a LoRA layer adapts: its own last name, or that of one parameter of it."""
    if isinstance(layer, ParamWrapper) and layer.parameter_name != "weight":
        return layer.parameter_name
    return name.removesuffix(".base_layer").rsplit(".", 1)[-1]


def _widen(peft: PeftModel, folder: str) -> None:
    """Loads a saved adapter in 32 bits: PEFT rounds modules that are saved whole to the base's precision."""
    narrow = [each for each in peft.parameters() if each.requires_grad and each.dtype != torch.float32]
    if not narrow:
        return
    for each in narrow:
        each.data = each.data.float()
    set_peft_model_state_dict(peft, load_peft_weights(folder, device=str(peft.device)))


def adapter_rank(trained: Trained) -> int:
    """The adapter's rank; 0 when there is no adapter."""
    if trained.peft is None:
        return 0
    config = trained.peft.peft_config["default"]
    return config.r if isinstance(config, LoraConfig) else 0


def inside(peft: PeftModel) -> PreTrainedModel:
    """The model that carries the adapters in its modules."""
    model = peft.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"PEFT wraps a {type(model).__name__}, which is no model of transformers")
    return model


def _check_names(model: nn.Module, field: str, names: Sequence[str]) -> None:
    """PEFT ignores a name in modules_to_save that matches nothing: refuse it here, with the nearest ones."""
    known = {name for name, _ in model.named_modules() if name}
    last = {name.rsplit(".", 1)[-1] for name in known}
    for name in names:
        if name in last or any(each == name or each.endswith("." + name) for each in known):
            continue
        near = difflib.get_close_matches(name, sorted(last), n=3, cutoff=0.5)
        raise TrainingError(
            "MODULE_NOT_FOUND",
            f"{field} names {name!r}, and the model has no such module.",
            f"Did you mean {', '.join(near)}?" if near else f"Its modules are {', '.join(sorted(last)[:20])}.",
        )


@contextlib.contextmanager
def _not_found(source: BaseModelSource) -> Iterator[None]:
    """Turns what transformers raises for a model that is not there into MODEL_NOT_FOUND."""
    try:
        yield
    except (OSError, ValueError) as error:
        if durable.is_full(error):  # a model of the hub is written to its cache
            raise
        name = source.location if source.is_hub else os.path.basename(source.location)
        raise TrainingError(
            "MODEL_NOT_FOUND",
            f"The base model {name} cannot be loaded: {error}".splitlines()[0],
            "Check its name, revision and format (safetensors), and for a gated model the hub token.",
        ) from error


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """A trainer's standard error is a log, and no terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _peft_on_this_transformers() -> Iterator[None]:
    """PEFT 0.21 asks a model for a property that transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
