"""Families that are not known here, converted by a llama.cpp that the operator named."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoConfig

from luthier.v1.export_task_pb2 import (
    GGUF_TYPE_BF16,
    GGUF_TYPE_F16,
    GGUF_TYPE_Q8_0,
    GGUF_TYPE_UNSPECIFIED,
    WEIGHT_TYPE_BF16,
    WEIGHT_TYPE_F16,
    GgufExport,
    MergedExport,
)
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.gguf.families import FAMILIES
from luthier_trainer.export.gguf.model import file_name
from luthier_trainer.export.gguf.modelfile import write_modelfile
from luthier_trainer.export.gguf.tokenizer import template_of_model
from luthier_trainer.export.merged import write_merged
from luthier_trainer.export.source import Tuned
from luthier_trainer.export.surroundings import end_tokens, load_tokenizer
from luthier_trainer.stop import Check

SCRIPT = "convert_hf_to_gguf.py"
_TYPES = {GGUF_TYPE_UNSPECIFIED: "f16", GGUF_TYPE_F16: "f16", GGUF_TYPE_BF16: "bf16", GGUF_TYPE_Q8_0: "q8_0"}
_SECONDS = 6 * 3600.0
_POLL_SECONDS = 0.2
_TAIL = 1500


def is_foreign(tuned: Tuned) -> bool:
    """Whether the model is of a family that only llama.cpp's own converter may know."""
    config = AutoConfig.from_pretrained(tuned.base, trust_remote_code=False, local_files_only=True)
    return config.model_type not in FAMILIES


def require_external(llama_cpp: Path, options: GgufExport) -> None:
    """Raises TrainingError EXPORT_UNSUPPORTED unless the operator's llama.cpp has a converter that writes the type."""
    if not (llama_cpp / SCRIPT).is_file():
        raise TrainingError(
            "EXPORT_UNSUPPORTED",
            f"The directory that --llama-cpp-dir names has no {SCRIPT}.",
            "Ask the operator for a whole checkout of llama.cpp.",
        )
    if options.type not in _TYPES:
        raise TrainingError(
            "EXPORT_UNSUPPORTED",
            f"llama.cpp's converter writes {', '.join(sorted(set(_TYPES.values())))}, and another type is asked for.",
            "Ask for one of those, and quantise its file with llama-quantize.",
        )


def convert(
    tuned: Tuned,
    options: GgufExport,
    folder: Path,
    llama_cpp: Path,
    progress: Callable[[int, int], None],
    check: Check,
    seconds: float = _SECONDS,
) -> None:
    """Merges the model into a folder within `folder`, which goes again, and has llama.cpp's converter make a file.
    Raises TrainingError EXPORT_UNSUPPORTED with the end of what the converter said, and what `check` raises."""
    require_external(llama_cpp, options)
    kind = _TYPES[options.type]
    path = folder / file_name(options.type)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        merged = Path(temporary) / "merged"
        merged.mkdir()
        weights = WEIGHT_TYPE_BF16 if options.type == GGUF_TYPE_BF16 else WEIGHT_TYPE_F16
        write_merged(tuned, MergedExport(weights=weights), merged, progress, check)
        log = Path(temporary) / "log"
        command = [sys.executable, str(llama_cpp / SCRIPT), str(merged), "--outfile", str(path), "--outtype", kind]
        status = _run(command, Path(temporary), log, check, seconds)
        if status != 0 or not path.is_file():
            said = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
            tail = said.replace(temporary, "").replace(f"{llama_cpp}/", "")
            raise TrainingError(
                "EXPORT_UNSUPPORTED",
                f"llama.cpp's converter {_ended(status)}. Its last words: {tail or 'none'}",
                "Ask the operator whether the llama.cpp of --llama-cpp-dir knows this model.",
            )
    tokenizer = load_tokenizer(tuned)
    config = AutoConfig.from_pretrained(tuned.base, trust_remote_code=False, local_files_only=True)
    ends = tokenizer.convert_ids_to_tokens(end_tokens(tuned, config))
    write_modelfile(
        folder, f"FROM ./{path.name}", template_of_model(tokenizer), [each for each in ends if isinstance(each, str)]
    )


def _run(command: list[str], folder: Path, log: Path, check: Check, seconds: float) -> int | None:
    """The exit status; None when it took too long. It gets no secrets: of this process's environment only what finds
    programs and says where files are."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    until = time.monotonic() + seconds
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(_POLL_SECONDS)
                check()
                if time.monotonic() > until:
                    return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _ended(status: int | None) -> str:
    if status is None:
        return "took too long"
    return "wrote no file" if status == 0 else f"failed with {status}"
