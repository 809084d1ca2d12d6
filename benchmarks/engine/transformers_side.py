"""A pass of transformers' own Trainer with PEFT: padded batches, and the full logits of the model's own forward."""

import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from benchmarks.engine import workload
from benchmarks.engine.clock import TrainerClock
from benchmarks.engine.contestant import Contestant
from benchmarks.engine.passes import Pass, Stopwatch

_IGNORED = -100


def run(contestant: Contestant, model_dir: Path, rows: Path, work: Path) -> Pass:
    """One epoch over the rows."""
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    read = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(work / "datasets"))
    tokenised = [_tokenised(tokenizer, each) for each in read["messages"]]
    loaded = torch.bfloat16 if contestant.dtype.startswith("bfloat16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=loaded)
    lora = LoraConfig(r=workload.RANK, lora_alpha=2 * workload.RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=str(work / "transformers"),
        num_train_epochs=1,
        per_device_train_batch_size=contestant.batch,
        gradient_accumulation_steps=contestant.accumulation,
        bf16="autocast" in contestant.dtype,
        use_cpu=True,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential" if contestant.ordered else "random",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    watch = Stopwatch()
    clock = TrainerClock(watch)
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(tokenised),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=_IGNORED),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    result = trainer.train()
    return Pass(
        **watch.times,
        tokens=sum(len(each["input_ids"]) for each in tokenised),
        scored=sum(sum(label != _IGNORED for label in each["labels"]) for each in tokenised),
        steps=clock.steps,
        loss=float(result.training_loss),
        dtype=contestant.dtype,
    )


def _tokenised(tokenizer: Any, messages: Any) -> dict[str, list[int]]:
    """A chat's tokens, and labels for those of the assistant alone."""
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, truncation=False
    )
    tokens, mask = found["input_ids"][: workload.MAX_LENGTH], found["assistant_masks"][: workload.MAX_LENGTH]
    labels = [token if is_assistant else _IGNORED for token, is_assistant in zip(tokens, mask, strict=True)]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
