"""A pass of TRL's SFTTrainer."""

import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from benchmarks.engine import workload
from benchmarks.engine.clock import TrainerClock
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.passes import Pass, Stopwatch


def run(contestant: Contestant, model_dir: Path, rows: Path, work: Path) -> Pass:
    """One epoch over the rows."""
    warnings.simplefilter("ignore")
    loaded = torch.bfloat16 if contestant.dtype.startswith("bfloat16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=loaded)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    dataset = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(work / "datasets"))
    arguments = SFTConfig(
        output_dir=str(work / "trl"),
        num_train_epochs=1,
        per_device_train_batch_size=contestant.batch,
        gradient_accumulation_steps=contestant.accumulation,
        gradient_checkpointing=contestant.checkpointing,
        bf16="autocast" in contestant.dtype,
        fp16=False,
        use_cpu=True,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        max_length=workload.MAX_LENGTH,
        packing=contestant.strategy == "packing",
        packing_strategy="bfd",
        train_sampling_strategy="sequential" if contestant.ordered else "random",
        assistant_only_loss=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    lora = LoraConfig(r=workload.RANK, lora_alpha=2 * workload.RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    watch = Stopwatch()
    clock = TrainerClock(watch)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
    )
    tokens, scored = count(trainer.train_dataset)
    result = trainer.train()
    return Pass(
        **watch.times,
        tokens=tokens,
        scored=scored,
        steps=clock.steps,
        loss=float(result.training_loss),
        dtype=contestant.dtype,
    )


def count(rows: Any) -> tuple[int, int]:
    """(real tokens, scored tokens) of what TRL made of the rows, packed or not."""
    tokens = sum(len(each) for each in rows["input_ids"])
    if "labels" in rows.column_names:
        return tokens, sum(sum(label != -100 for label in each) for each in rows["labels"])
    return tokens, sum(sum(each) for each in rows["assistant_masks"])
