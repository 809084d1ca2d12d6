"""The loss equals the reference: TRL's SFTTrainer on the pretrained `builtin/tiny`.

A random model's loss hardly depends on the mask, so the model is a trained one.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fidelity.jobs import Recorder, task
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier_trainer import inspect, sft
from luthier_trainer import job as job_module
from luthier_trainer.control import NoControl
from luthier_trainer.job import Job
from luthier_trainer.order import RowOrder

STEPS = 50
BATCH = 2
RATE = 5e-3


def write_chats(samples: Path, path: Path) -> list[dict[str, Any]]:
    """As many rows of gsm8k as the steps need, a few of them with two turns more."""
    lines = (samples / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    raw = [json.loads(each) for each in lines[: STEPS * BATCH + 10]]
    raw.sort(key=lambda each: len(each["question"]) + len(each["answer"]))
    chats: list[dict[str, Any]] = []
    for each in raw[: STEPS * BATCH]:
        turns = [{"role": "user", "content": each["question"]}, {"role": "assistant", "content": each["answer"]}]
        if len(chats) % 10 == 0:
            turns += [{"role": "user", "content": "Thanks!"}, {"role": "assistant", "content": "You are welcome."}]
        chats.append({"messages": turns})
    path.write_text("".join(json.dumps(each) + "\n" for each in chats), encoding="utf-8")
    return chats


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_fifty_steps_follow_trls_sft_trainer(tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    base = inspect.BUILTIN / "tiny"
    chats = write_chats(samples, tmp_path / "chats.jsonl")

    made: list[Job] = []
    started: dict[str, torch.Tensor] = {}

    def set_up(*arguments: Any) -> Job:
        made.append(job_module.set_up(*arguments))
        started.update({name: each.clone() for name, each in made[0].masters.named(made[0].masters.values)})
        return made[0]

    monkeypatch.setattr(sft, "set_up", set_up)
    ours = Recorder()
    numbers: dict[str, Any] = {"batch_size": BATCH, "learning_rate": RATE, "weight_decay": 0.0, "max_length": 1024}
    request = task(tmp_path, base, tmp_path / "chats.jsonl", epochs=1.0, **numbers)
    request.spec.fine_tune.checkpoints.every_steps = 1000
    sft.train(request, ours, NoControl())

    order = RowOrder(made[0].order.rows, BATCH, seed=7)
    permuted = [int(index) for step in range(STEPS) for index in order.batch(step)]
    assert sorted(permuted) == list(range(STEPS * BATCH))

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    theirs = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert theirs.keys() == started.keys()
    with torch.no_grad():
        for name, each in theirs.items():
            each.copy_(started[name])
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([chats[index] for index in permuted]),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=5,  # a tenth of all steps, as the job's warmup_ratio
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=1024,
            assistant_only_loss=True,
            activation_checkpointing=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=True,
            seed=7,
        ),
    )
    seen: Any = trainer.train_dataset
    for row, index in enumerate(permuted):
        (example,) = made[0].rows.examples(index)
        batch = trainer.data_collator([seen[row]])
        labels = torch.where(torch.from_numpy(example.trained), torch.from_numpy(example.input_ids).long(), -100)
        assert batch["input_ids"][0].tolist() == example.input_ids.tolist()
        assert batch["labels"][0].tolist() == labels.tolist()

    trainer.train()
    logged = [each for each in trainer.state.log_history if "loss" in each]
    steps = list(ours.steps())
    assert len(logged) == len(steps) == STEPS
    for mine, reference in zip(steps, logged, strict=True):
        assert mine.loss == pytest.approx(reference["loss"], rel=1e-3), f"step {mine.step}"
        assert mine.learning_rate == pytest.approx(reference["learning_rate"], rel=1e-6, abs=1e-12)
        assert mine.grad_norm == pytest.approx(reference["grad_norm"], rel=1e-2)
    assert steps[-1].loss < steps[0].loss
