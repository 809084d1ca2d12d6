"""What training costs, and what the device gives."""

import math
import sys
from pathlib import Path

import pytest
import torch
from fidelity.jobs import Recorder, chats, task, tiny_base
from peft import PeftModel
from transformers import AutoModelForCausalLM

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier.v1 import event_pb2, job_pb2
from luthier_trainer import sft
from luthier_trainer.config import LoraSettings
from luthier_trainer.control import NoControl
from luthier_trainer.data.masks.masking import Masking
from luthier_trainer.data.masks.template import template_of
from luthier_trainer.data.tokens import tokenised
from luthier_trainer.data.tokens.options import Options
from luthier_trainer.data.tokens.overlong import Overlong
from luthier_trainer.flops import Operations, operations
from luthier_trainer.model import Trained, load_base, load_tokenizer, prepare

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks.engine import workload
from benchmarks.engine.flops import training_operations

LINEARS = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
FACTORS = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
HEAD = 32 * 4096


def trained(base: Path, lora: LoraSettings | None) -> Trained:
    source = BaseModelSource(location=str(base))
    model = load_base(source, torch.float32, torch.device("cpu"), "auto")
    return prepare(model, source, lora, name="base", seed=0, resume_from=None)


@pytest.mark.parametrize(
    ("lora", "per_token", "per_scored"),
    [
        (LoraSettings(4, 8.0, 0.0, ("all-linear",), ()), 4 * LINEARS + 6 * FACTORS, 4 * HEAD),
        (LoraSettings(4, 8.0, 0.0, ("all-linear",), ("lm_head",)), 4 * LINEARS + 6 * FACTORS, 6 * HEAD),
        (None, 6 * LINEARS, 6 * HEAD),
    ],
    ids=["lora", "saved-head", "full"],
)
def test_operations_are_read_from_the_modules(
    tmp_path: Path, lora: LoraSettings | None, per_token: float, per_scored: float
) -> None:
    found = operations(trained(tiny_base(tmp_path), lora))
    assert found == Operations(per_token, per_scored, 12 * 2 * 32)


def test_the_engine_counts_what_the_benchmark_counts(tmp_path: Path) -> None:
    workload.write_model(tmp_path)
    lora = LoraSettings(workload.RANK, 32.0, 0.0, ("all-linear",), ())
    assert operations(trained(tmp_path, lora)) == training_operations()


def test_a_document_by_hand() -> None:
    assert Operations(100.0, 10.0, 1.0).of(4, 2) == 400 + 20 + 10


def test_each_step_tells_how_busy_the_device_is(tmp_path: Path) -> None:
    recorder = Recorder()
    sft.train(task(tmp_path, tiny_base(tmp_path), chats(tmp_path / "chats.jsonl"), max_steps=3), recorder, NoControl())
    (resolved,) = [each for each in recorder.reports if isinstance(each, event_pb2.PlanResolved)]
    assert resolved.peak_flops > 1e9
    steps = list(recorder.steps())
    assert len(steps) == 3
    for each in steps:
        assert 0 < each.metrics["mfu"] < 1
        assert 1e8 < each.metrics["memory_bytes"] < 1e11


def test_perplexity_and_accuracy_are_those_of_the_model_that_comes_out(tmp_path: Path) -> None:
    base, data, recorder = tiny_base(tmp_path), chats(tmp_path / "chats.jsonl"), Recorder()
    made = task(tmp_path, base, data, max_steps=12, evaluation=job_pb2.Evaluation(every_steps=6))
    sft.train(made, recorder, NoControl())
    last = list(recorder.evaluations())[-1]
    tokenizer = load_tokenizer(BaseModelSource(location=str(base)))
    rows = tokenised.load(
        made.training_dataset,
        tokenizer,
        template_of(tokenizer),
        Options(256, Overlong.TRUNCATE, Masking()),
        cache_dir=tmp_path / "other",
        reporter=recorder,
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "model").eval()
    losses: list[float] = []
    correct = 0
    for index in range(len(rows)):
        (example,) = rows.examples(index)
        ids = torch.tensor(example.input_ids, dtype=torch.int64)
        with torch.no_grad():
            chances = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        for place in range(1, len(ids)):
            if example.trained[place]:
                losses.append(-float(chances[place - 1, ids[place]]))
                correct += int(chances[place - 1].argmax() == ids[place])
    assert last.scored_tokens == len(losses)
    assert last.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert last.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert last.token_accuracy == correct / len(losses) > 0
