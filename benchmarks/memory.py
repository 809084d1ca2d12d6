"""Whether the memory that training takes is as foretold: `python -m benchmarks.memory [SETTING]...`.

Each setting is a job of its own in a process of its own, on a random model. `predicted` was told before anything ran,
`calibrated` after two short probes, `measured` is the increase of the maximum resident size over the loaded process.
Numbers are bytes. They do not depend on how busy the machine is.
"""

import argparse
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine

_RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    """A job: its model's shape, its rows' words, its hyperparameters and its adapter. twice: with so little memory that
    its layers compute twice; tokens: about as many as its largest micro-batch has; room: memory, in shares of what so
    many tokens would take at most, so that it probes."""

    model: dict[str, Any]
    family: str = "llama"
    words: tuple[int, int] = (20, 400)
    numbers: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    full: bool = False
    last_layers: int = 0
    twice: bool = False
    tokens: int = 4096
    room: float = 1.4


def _shape(vocabulary: int, width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
    }


_5M, _28M, _100M = _shape(4096, 256, 5, 4), _shape(8192, 512, 8, 8), _shape(16384, 768, 11, 12)
_SETTINGS = {
    "lora-5m": Setting(_5M),
    "lora-28m": Setting(_28M),
    "lora-100m": Setting(_100M),
    "lora-bf16-5m": Setting(_5M, numbers={"dtype": "DTYPE_BFLOAT16"}, room=0.8),
    "lora-bf16-28m": Setting(_28M, numbers={"dtype": "DTYPE_BFLOAT16"}, room=0.7),
    "lora-rank64-28m": Setting(_28M, adapter={"rank": 64, "alpha": 64.0}),
    "full-28m": Setting(_28M, full=True),
    "last-layers-28m": Setting(_28M, full=True, last_layers=2),
    "saved-head-5m": Setting(_5M, saved=("lm_head",)),
    "dora-5m": Setting(_5M, adapter={"use_dora": True}),
    "long-documents-5m": Setting(_5M, words=(1500, 1500), numbers={"max_length": 2048, "batch_size": 4}, tokens=1536),
    "small-batches-28m": Setting(_28M, words=(20, 120), numbers={"batch_size": 2}, tokens=256),
    "checkpointing-28m": Setting(_28M, words=(700, 1400), twice=True, tokens=2048),
    "vocabulary-128k": Setting(_shape(128256, 256, 4, 4)),
    "gpt2-10m": Setting({"n_embd": 256, "n_layer": 6, "n_head": 4, "vocab_size": 4096}, family="gpt2", room=0.8),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("settings", nargs="*", choices=[*_SETTINGS, []], help="all of them without")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=_RESULTS, metavar="DIR", help="where the result goes")
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(_measure(_SETTINGS[chosen.child])))
        return
    described = machine.describe()
    path = chosen.out / f"memory-{machine.slug(described)}.json"
    rows: dict[str, Any] = json.loads(path.read_text())["settings"] if chosen.settings and path.exists() else {}
    for name in chosen.settings or _SETTINGS:
        command = [sys.executable, "-m", "benchmarks.memory", "--child", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
            continue
        rows[name] = found = json.loads(done.stdout.splitlines()[-1])
        print(_line(name, found), flush=True)
        result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": described, "settings": rows}
        path.write_text(json.dumps(result, indent=2) + "\n")


def _line(name: str, found: dict[str, Any]) -> str:
    measured = found["measured"]
    errors = [found[each] / measured - 1 if found[each] else float("nan") for each in ("predicted", "calibrated")]
    return (
        f"{name:18} {found['tokens']:6} tokens  measured {measured / 1e6:8.1f} MB"
        f"  predicted {errors[0]:+.1%}  calibrated {errors[1]:+.1%}"
    )


def _measure(setting: Setting) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_base(folder, setting)
        _make_rows(folder / "rows.jsonl", setting.words)
        return _train(folder, setting)


def _make_base(folder: Path, setting: Setting) -> None:
    """In a process of its own, whose memory does not count."""
    script = (
        "import json, sys, torch\n"
        "from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM\n"
        "family, shape, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]\n"
        "torch.manual_seed(0)\n"
        "ends = dict(pad_token_id=0, bos_token_id=None, eos_token_id=2)\n"
        "if family == 'gpt2': model = GPT2LMHeadModel(GPT2Config(n_positions=4096, **shape, **ends))\n"
        "else: model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=4096, **shape, **ends))\n"
        "model.save_pretrained(out)\n"
    )
    base = folder / "base"
    command = [sys.executable, "-c", script, setting.family, json.dumps(setting.model), str(base)]
    subprocess.run(command, check=True, capture_output=True)
    from luthier_trainer import inspect

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(inspect.BUILTIN / "tiny" / name, base / name)


def _make_rows(path: Path, words: tuple[int, int]) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(64):
            answer = " ".join(draw.choice(("one", "two", "three", "four")) for _ in range(draw.randint(*words)))
            turns = [{"role": "user", "content": f"Count {number}."}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def _train(folder: Path, setting: Setting) -> dict[str, Any]:
    """Trains three steps with a memory limit that makes the job probe, or compute its layers twice."""
    from luthier_trainer.main import set_up_libraries

    set_up_libraries()
    import datasets  # noqa: F401 - a loaded process has these
    import torch

    from luthier.trainer.v1.report_pb2 import Finished
    from luthier.trainer.v1.task_pb2 import BaseModelSource, DatasetSource, TrainerTask
    from luthier.v1 import event_pb2, job_pb2
    from luthier_trainer import memory, sft
    from luthier_trainer.config import read_settings
    from luthier_trainer.console import SilentReporter
    from luthier_trainer.control import NoControl
    from luthier_trainer.plan import Compute

    numbers: dict[str, Any] = {
        "batch_size": 16,
        "learning_rate": 1e-4,
        "lr_scheduler": "LR_SCHEDULER_CONSTANT",
        "max_grad_norm": 1.0,
        "max_length": 1024,
        "max_steps": 3,
        "seed": 1,
        "attn_implementation": "auto",
        "log_every": 1,
        "dtype": "DTYPE_FLOAT32",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
    } | setting.numbers
    spec = job_pb2.FineTuneTask(base_model="random", training_dataset="rows")
    spec.hyperparameters.CopyFrom(job_pb2.Hyperparameters(**numbers))
    spec.checkpoints.CopyFrom(job_pb2.Checkpoints(every_steps=2, keep=1))
    if setting.full:
        spec.full.train_last_layers = setting.last_layers
    else:
        adapter: dict[str, Any] = {"rank": 16, "alpha": 32.0, "dropout": 0.0} | setting.adapter
        spec.lora.CopyFrom(job_pb2.Lora(target_modules=["all-linear"], modules_to_save=setting.saved, **adapter))
    task = TrainerTask(
        job_id="job_1",
        attempt=1,
        spec=job_pb2.JobSpec(fine_tune=spec),
        base_model=BaseModelSource(location=str(folder / "base")),
        training_dataset=DatasetSource(path=str(folder / "rows.jsonl"), id="rows", name="rows@1", sha256="0" * 64),
        checkpoints_dir=str(folder / "checkpoints"),
        model_dir=str(folder / "model"),
        cache_dir=str(folder / "cache"),
        threads=1,
    )
    settings = read_settings(task)
    dtype = torch.bfloat16 if numbers["dtype"] == "DTYPE_BFLOAT16" else torch.float32
    compute = Compute(torch.device("cpu"), dtype, 1, ())
    need = memory.need(
        memory.on_meta(task.base_model, settings, compute), settings, compute, checkpointing=setting.twice
    )
    longest = numbers["max_length"]
    most = need.peak(setting.tokens, setting.tokens, min(longest, setting.tokens))
    task.memory_limit_bytes = int(most * 1.01) if setting.twice else int(most * setting.room)
    plans: list[event_pb2.PlanResolved] = []

    class Kept(SilentReporter):
        def report(self, payload: Any, *, durable: bool = False) -> None:
            if isinstance(payload, event_pb2.PlanResolved):
                plans.append(payload)
            super().report(payload, durable=durable)

    end = sft.train(task, Kept(), NoControl())
    assert isinstance(end, Finished)
    return {
        "setting": dataclasses.asdict(setting),
        "tokens": plans[0].micro_batch_tokens,
        "checkpointing": plans[0].activation_checkpointing,
        "parameters": plans[0].base_parameters,
        "predicted": plans[0].predicted_memory_bytes,
        "calibrated": plans[0].calibrated_memory_bytes,
        "measured": int(end.metrics["peak_memory_bytes"]),
    }


if __name__ == "__main__":
    main()
