"""Models that only an operator's llama.cpp may know: its converter runs apart, and its failure is told."""

import os
import time
from pathlib import Path

import pytest
import transformers
from unit.trainer.gguf_models import small

from luthier.v1.export_task_pb2 import GGUF_TYPE_BF16, GGUF_TYPE_Q4_K_M, GgufExport
from luthier_trainer.errors import TrainingError
from luthier_trainer.export import gguf
from luthier_trainer.export.gguf.external import SCRIPT, convert
from luthier_trainer.export.source import Tuned
from luthier_trainer.stop import StopRequested, never


@pytest.fixture
def foreign(tmp_path: Path) -> Tuned:
    """A GPT-2, which is not written here."""
    folder = tmp_path / "model"
    config = transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    small().save_pretrained(folder)
    return Tuned(folder, folder, None, "model_1")


def _llama_cpp(tmp_path: Path, script: str) -> str:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / SCRIPT).write_text(script)
    return str(folder)


def _write(tuned: Tuned, folder: Path, llama_cpp: str, options: GgufExport | None = None) -> None:
    folder.mkdir(exist_ok=True)
    gguf.write(tuned, options or GgufExport(), folder, lambda done, total: None, never, llama_cpp)


def test_another_family_is_refused_with_those_that_there_are(foreign: Tuned) -> None:
    with pytest.raises(TrainingError, match=r"gpt2 models, but of these: gemma, .*qwen3") as refused:
        gguf.require(foreign, GgufExport())
    assert refused.value.reason == "EXPORT_UNSUPPORTED"
    assert "--llama-cpp-dir" in refused.value.hint


def test_the_operators_converter_gets_the_merged_model_and_no_secrets(
    foreign: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import json, os, sys, pathlib\n"
        "assert pathlib.Path(sys.argv[3]).parent in pathlib.Path(sys.argv[1]).parents, 'it would outlive the export'\n"
        "files = sorted(each.name for each in pathlib.Path(sys.argv[1]).iterdir())\n"
        "pathlib.Path(sys.argv[3]).write_text(json.dumps([sys.argv[2], *sys.argv[4:], *files, *os.environ]))\n"
    )
    monkeypatch.setenv("LUTHIER_EXPORT_CREDENTIALS", "s3cret")
    _write(foreign, tmp_path / "export", _llama_cpp(tmp_path, script), GgufExport(type=GGUF_TYPE_BF16))

    got = (tmp_path / "export" / "model-bf16.gguf").read_text()
    assert '["--outfile", "--outtype", "bf16"' in got
    assert '"config.json"' in got
    assert '"model.safetensors"' in got
    assert "LUTHIER" not in got
    assert (tmp_path / "export" / "Modelfile").read_text().startswith("FROM ./model-bf16.gguf\n")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["export", "llama.cpp", "model"]
    assert sorted(each.name for each in (tmp_path / "export").iterdir()) == ["Modelfile", "model-bf16.gguf"]


def test_what_the_converter_said_last_is_the_error(foreign: Tuned, tmp_path: Path) -> None:
    llama_cpp = _llama_cpp(tmp_path, "raise SystemExit('this model has a strange head')")
    with pytest.raises(TrainingError, match=r"failed with 1.*this model has a strange head") as refused:
        _write(foreign, tmp_path / "export", llama_cpp)
    assert refused.value.reason == "EXPORT_UNSUPPORTED"


def test_a_type_that_no_converter_writes_and_a_folder_without_one_are_refused_first(
    foreign: Tuned, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=f"has no {SCRIPT}"):
        gguf.require(foreign, GgufExport(), str(tmp_path))
    with pytest.raises(TrainingError, match="bf16, f16, q8_0"):
        gguf.require(foreign, GgufExport(type=GGUF_TYPE_Q4_K_M), _llama_cpp(tmp_path, ""))


def test_a_converter_that_hangs_is_ended_with_its_children(foreign: Tuned, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = (
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)\n"
    )
    llama_cpp = Path(_llama_cpp(tmp_path, script))
    (tmp_path / "export").mkdir()

    def check() -> None:
        if pids.is_file() and len(pids.read_text().split()) == 2:
            raise StopRequested

    with pytest.raises(StopRequested):
        convert(foreign, GgufExport(), tmp_path / "export", llama_cpp, lambda done, total: None, check)
    for pid in pids.read_text().split():
        _require_gone(int(pid))

    pids.unlink()
    with pytest.raises(TrainingError, match="took too long"):
        convert(foreign, GgufExport(), tmp_path / "export", llama_cpp, lambda done, total: None, never, seconds=0.5)


def _require_gone(pid: int) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":  # ended, and not yet collected by who adopted it
            return
        time.sleep(0.05)
    raise AssertionError(f"{pid} still runs")
