"""A model as it will be trained, without its weights."""

import dataclasses

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier.v1 import job_pb2
from luthier_trainer import speedups
from luthier_trainer.config import Settings
from luthier_trainer.model import Trained, inside, load_config, prepare
from luthier_trainer.plan import Compute


def on_meta(source: BaseModelSource, settings: Settings, compute: Compute) -> Trained:
    """The model of a task on the meta device: every module, shape and dtype, no memory. Reads configurations alone,
    that of a continued adapter too. Quantised weights are as they would be without: `held` counts them by what is
    asked for.

    Raises TrainingError MODEL_NOT_FOUND, MODULE_NOT_FOUND, ADAPTER_UNSUPPORTED.
    """
    config = load_config(source)
    dtype = torch.float32 if settings.lora is None else compute.dtype
    attention = None if settings.attention == "auto" else settings.attention
    bare = BaseModelSource()
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)  # type: ignore[no-untyped-call]
        if settings.lora is not None and source.adapter_dir:
            adapter = PeftConfig.from_pretrained(source.adapter_dir)
            assert isinstance(adapter, LoraConfig)
            adapter.inference_mode = False
            adapter.init_lora_weights = False
            peft = get_peft_model(base, adapter)
            trained = Trained(inside(peft), peft, base.num_parameters(), "")
        else:
            plain = dataclasses.replace(settings.lora, init=job_pb2.LORA_INIT_KAIMING) if settings.lora else None
            trained = prepare(
                base,
                bare,
                plain,
                name="model",
                seed=0,
                resume_from=None,
                last_layers=settings.train_last_layers,
            )
    speedups.speed_up(trained.causal_lm)
    return trained
