"""What a base model is, told from its files without loading it.

    python -m luthier_trainer.inspect BASE [--root DIR]...

Writes a serialized `luthier.trainer.v1.ModelReport` to standard output and nothing else. Standard library and protobuf
only. A base is `builtin/NAME`, an absolute path below a root that the operator allows, or a hub id, which is taken on
trust here and checked when it is fetched. Weights must be safetensors, and models that bring code of their own are
refused: neither a pickle nor a model's Python ever runs.
"""

import argparse
import difflib
import json
import math
import re
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.trainer.v1 import report_pb2

BUILTIN = Path(__file__).parent / "builtin"
MAX_JSON_BYTES = 32 * 1024 * 1024
MAX_HEADER_BYTES = 100 * 1024 * 1024

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}", re.ASCII)
# As huggingface_hub validates repository ids: words with inner dots and dashes, never `..` or `--`, 96 characters.
_HUB_ID = re.compile(r"(?=.{1,96}\Z)(?:\w(?:[\w.-]*\w)?/)?\w(?:[\w.-]*\w)?", re.ASCII)
_MODEL_ID = re.compile(r"model_[0-9A-HJKMNP-TV-Z]{26}", re.ASCII)
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "consolidated.00.pth", "model.pt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class _NotFoundError(Exception):
    """There is no such model; the message says what there is."""


class _UnusableError(Exception):
    """There is such a model, and it cannot be used; the message says why and what helps."""


@dataclass(frozen=True)
class _Weights:
    modules: list[str]
    max_positions: int
    hidden_size: int
    model_type: str
    parameters: int


def locate(base_model: str, allowed_roots: Sequence[Path] = ()) -> report_pb2.ModelReport:
    """Finds a base model and judges whether it can be trained. A problem is in the report, never an exception.

    A directory: `directory`, `module_names`, `max_positions`, `hidden_size`, `model_type`, `parameters`. A hub id:
    `is_hub`. With an adapter on top, the same fields speak of the base below, and `adapter_dir` and `base_location` are
    set too.
    """
    report = report_pb2.ModelReport()
    roots = [root.resolve() for root in (*allowed_roots, BUILTIN)]
    try:
        directory = _directory(base_model, allowed_roots)
        if directory is not None and (directory / "adapter_config.json").is_file():
            report.found = True
            report.adapter_dir = str(directory)
            base_model = _base_of_adapter(directory, roots)
            directory = _directory_below_adapter(base_model, allowed_roots)
            report.base_location = base_model if directory is None else str(directory)
        report.found = True
        if directory is None:
            report.is_hub = True
            return report
        weights = _weights(directory, roots)
    except _NotFoundError as error:
        report.problem = str(error)
    except _UnusableError as error:
        report.found = True
        report.problem = str(error)
    except OSError as error:
        report.problem = f"The model's files cannot be read: {error.strerror or type(error).__name__}."
    else:
        report.directory = str(directory)
        report.module_names.extend(weights.modules)
        report.max_positions = weights.max_positions
        report.hidden_size = weights.hidden_size
        report.model_type = weights.model_type
        report.parameters = min(weights.parameters, 2**62)
    return report


def matches(target: str, module_names: Iterable[str]) -> bool:
    """Whether a name of target modules means at least one module, by PEFT's rule: the whole name, or its last parts.
    `all-linear` always does."""
    return target == "all-linear" or any(name == target or name.endswith("." + target) for name in module_names)


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """At most three names that `name` may have been meant for, likeliest first; of dotted names the last part."""
    known = sorted({part for full in names for part in (full, full.rpartition(".")[2]) if not part.isdecimal()})
    by_folded = {known_name.lower(): known_name for known_name in reversed(known)}
    return [by_folded[near] for near in difflib.get_close_matches(name.lower(), by_folded, 3, 0.6)]


def _directory(base_model: str, allowed_roots: Sequence[Path]) -> Path | None:
    """The directory that a base names, resolved; None for a hub id."""
    if base_model.startswith("builtin/"):
        return _builtin(base_model.removeprefix("builtin/"))
    if base_model.startswith("/"):
        return _allowed(base_model, allowed_roots)
    if _MODEL_ID.fullmatch(base_model):
        raise _NotFoundError(
            f"{base_model} is the id of a model that Luthier made; only the server knows where it lies."
        )
    if _HUB_ID.fullmatch(base_model) and ".." not in base_model and "--" not in base_model:
        return None
    raise _NotFoundError(
        "The base model must be a hub id (Qwen/Qwen2.5-0.5B), builtin/NAME, or an absolute path to a directory."
    )


def _builtin(name: str) -> Path:
    names = sorted(path.name for path in BUILTIN.iterdir() if (path / "config.json").is_file())
    if not _NAME.fullmatch(name) or name not in names:
        raise _NotFoundError(f"There is no such built-in model. There is: {', '.join(f'builtin/{n}' for n in names)}.")
    return (BUILTIN / name).resolve()


def _allowed(path: str, allowed_roots: Sequence[Path]) -> Path:
    """The path, resolved, when it lies below an allowed root; whether it exists is told of those paths only."""
    if not allowed_roots:
        raise _NotFoundError("No directory of models is allowed here. Start the server with luthierd --model-root DIR.")
    try:
        resolved = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise _NotFoundError("The path of the base model cannot be resolved.") from error
    if not _below(resolved, [root.resolve() for root in allowed_roots]):
        allowed = ", ".join(str(root).encode(errors="backslashreplace").decode() for root in allowed_roots)
        raise _NotFoundError(
            f"The path lies outside the directories that hold models ({allowed}). "
            "Allow one with luthierd --model-root DIR."
        )
    if not resolved.is_dir():
        raise _NotFoundError("There is no such directory.")
    return resolved


def _below(path: Path, roots: Iterable[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _base_of_adapter(directory: Path, roots: Sequence[Path]) -> str:
    config = _read_json(directory / "adapter_config.json", roots)
    if config.get("peft_type") != "LORA":
        raise _UnusableError("The adapter is no LoRA adapter; training can go on from LoRA adapters only.")
    if not (directory / "adapter_model.safetensors").is_file():
        raise _UnusableError(_no_safetensors(directory, "adapter_model.safetensors"))
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise _UnusableError("The adapter's adapter_config.json does not name its base model.")
    if not base.isprintable():
        raise _UnusableError("The adapter's adapter_config.json names a base model that cannot be one.")
    return base


def _directory_below_adapter(base_model: str, allowed_roots: Sequence[Path]) -> Path | None:
    """As `_directory`. A path into the built-in models is allowed too, as saved adapters hold one."""
    try:
        if base_model.startswith("/"):
            directory: Path | None = _allowed(base_model, (*allowed_roots, BUILTIN))
        else:
            directory = _directory(base_model, allowed_roots)
    except _NotFoundError as error:
        raise _UnusableError(f"The base model of the adapter cannot be used. {error}") from error
    if directory is not None and (directory / "adapter_config.json").is_file():
        raise _UnusableError("The base of the adapter is an adapter itself. Merge that one first.")
    return directory


def _weights(directory: Path, roots: Sequence[Path]) -> _Weights:
    config = _read_json(directory / "config.json", roots)
    if config.get("auto_map"):
        raise _UnusableError("The model brings code of its own (auto_map in config.json), which is never run here.")
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise _UnusableError("The model's directory has no tokenizer (tokenizer.json).")
    modules: dict[str, None] = {}
    parameters = 0
    for shard in _shards(directory, roots):
        for tensor, weights in _tensors(_fenced(shard, roots)).items():
            modules.setdefault(tensor.rpartition(".")[0] or tensor)
            parameters += weights
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if architecture.endswith(_HEADS) and not any(name.rpartition(".")[2] == "lm_head" for name in modules):
        modules.setdefault("lm_head")  # tied to the embeddings, so it is in no file
    family = config.get("model_type")
    return _Weights(
        list(modules),
        max_positions=_number(config, _POSITIONS),
        hidden_size=_number(config, _WIDTHS),
        model_type=family if isinstance(family, str) and family.isprintable() else "",
        parameters=parameters,
    )


def _number(config: dict[str, object], keys: Sequence[str]) -> int:
    """What a configuration, or that of its text model, says under the first of these names; 0 when nothing."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in keys:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
                return value
    return 0


def _shards(directory: Path, roots: Sequence[Path]) -> list[Path]:
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        raise _UnusableError(_no_safetensors(directory, "model.safetensors"))
    weight_map = _read_json(index, roots).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _UnusableError("model.safetensors.index.json has no weight_map.")
    names = dict.fromkeys(weight_map.values())
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise _UnusableError("model.safetensors.index.json names a file that is no safetensors file beside it.")
        if not (directory / name).is_file():
            raise _UnusableError(f"{name} is missing, though model.safetensors.index.json names it.")
    return [directory / name for name in names]


def _no_safetensors(directory: Path, wanted: str) -> str:
    if any((directory / name).exists() for name in _PICKLES):
        return (
            f"The weights are pickled; only safetensors are loaded, and {wanted} is missing. Convert them where they "
            "come from: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR) writes safetensors."
        )
    return f"{wanted} is missing."


def _fenced(path: Path, roots: Sequence[Path]) -> Path:
    resolved = path.resolve()
    if not _below(resolved, roots):
        raise _UnusableError(f"{path.name} is a link out of the directories that hold models.")
    return resolved


def _read_json(path: Path, roots: Sequence[Path]) -> dict[str, object]:
    if not path.is_file():
        raise _UnusableError(f"{path.name} is missing.")
    fenced = _fenced(path, roots)
    if fenced.stat().st_size > MAX_JSON_BYTES:
        raise _UnusableError(f"{path.name} is larger than {MAX_JSON_BYTES // 2**20} MiB.")
    return _json_object(fenced.read_bytes(), path.name)


def _json_object(content: bytes, name: str) -> dict[str, object]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"{name} is not JSON.") from error
    if not isinstance(value, dict):
        raise _UnusableError(f"{name} is not a JSON object.")
    return value


def _tensors(path: Path) -> dict[str, int]:
    """Names in a safetensors header, each with how many numbers it holds. The header is its length (u64, little
    endian), then a JSON object with shapes and offsets into the rest. A file that is shorter than its header says was
    not downloaded to its end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _UnusableError(f"{path.name} is not a safetensors file.")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise _UnusableError(f"{path.name} is not a safetensors file, or was cut off.")
        header = _json_object(file.read(length), f"The header of {path.name}")
    header.pop("__metadata__", None)
    if not all(name.isprintable() for name in header):
        raise _UnusableError(f"{path.name} has a broken safetensors header.")
    ends = []
    weights: dict[str, int] = {}
    for name, tensor in header.items():
        described = tensor if isinstance(tensor, dict) else {}
        offsets = described.get("data_offsets")
        if not isinstance(offsets, list) or len(offsets) != 2 or not isinstance(offsets[1], int):
            raise _UnusableError(f"{path.name} has a broken safetensors header.")
        ends.append(offsets[1])
        weights[name] = _elements(described.get("shape"))
    if max(ends, default=0) > size - 8 - length:
        raise _UnusableError(f"{path.name} was cut off: it is shorter than its header says.")
    return weights


def _elements(shape: object) -> int:
    """The product of a shape; 0 for what is none."""
    if not isinstance(shape, list) or not all(isinstance(each, int) and 0 <= each < 2**40 for each in shape):
        return 0
    return math.prod(shape[:8])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m luthier_trainer.inspect", description="Inspect a base model.")
    parser.add_argument("base", help="builtin/NAME, an absolute path, or a hub id")
    parser.add_argument("--root", action="append", default=[], type=Path, help="a directory that models may lie in")
    given = parser.parse_args(arguments)
    sys.stdout.buffer.write(locate(given.base, given.root).SerializeToString())
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
