"""The tuned model that is exported, as it lies on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from luthier.trainer.v1.task_pb2 import BaseModelSource, TrainerTask
from luthier_trainer import durable
from luthier_trainer.errors import TrainingError
from luthier_trainer.inspect import BUILTIN
from luthier_trainer.licence import licence_in
from luthier_trainer.save import LINEAGE

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_BASE_FILES = ("*.json", "*.safetensors", "*.jinja", "LICENSE*", "README.md")


@dataclass(frozen=True)
class Tuned:
    """A tuned model on disk, ready to be read; nothing is loaded.

    directory: the model or checkpoint, with its tokenizer, chat template and luthier.json (a checkpoint has none).
    base: the directory of the base's configuration and weights; `directory` itself after full fine-tuning. adapter:
    the directory with adapter_config.json and adapter_model.safetensors; None after full fine-tuning. name:
    `model_...` or `job_...:step-200`. base_name: what the base is called outside of this server: a hub id,
    `builtin/tiny`, or the last part of its path; empty after full fine-tuning of something unknown. base_revision: the
    commit of a hub's base.
    """

    directory: Path
    base: Path
    adapter: Path | None
    name: str
    base_name: str = ""
    base_revision: str = ""

    @property
    def base_licence(self) -> str:
        """The licence of the base, as the model's own note or the base's files tell; empty when they do not."""
        noted = read_json(self.directory / LINEAGE).get("base_model", {})
        return (_text(noted, "licence") if isinstance(noted, dict) else "") or licence_in(self.base)


def read_tuned(task: TrainerTask) -> Tuned:
    """The tuned model of an export's task. A base of the hub comes from the hub's cache, and is fetched if it is not
    there. Raises TrainingError MODEL_NOT_FOUND, EXPORT_UNSUPPORTED."""
    directory = Path(task.export.model_dir)
    name = task.export.model_id
    lineage = read_json(directory / LINEAGE).get("base_model", {})
    noted = lineage if isinstance(lineage, dict) else {}
    if (directory / ADAPTER_CONFIG).is_file():
        if not (directory / ADAPTER_WEIGHTS).is_file():
            raise _not_found(f"{name} has no {ADAPTER_WEIGHTS}")
        named = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        base, revision = _base(task.base_model, _text(noted, "hub_id"), _text(noted, "revision"))
        return Tuned(directory, base, directory, name, _outside_name(task.base_model, named), revision)
    if (directory / CONFIG).is_file() and has_weights(directory):
        base_name = _outside_name(task.base_model, noted.get("name"))
        return Tuned(directory, directory, None, name, base_name, _text(noted, "revision"))
    raise _not_found(f"{name} is neither an adapter nor a whole model")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a whole model. Raises TrainingError MODEL_NOT_FOUND."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    found = read_json(directory / _INDEX).get("weight_map")
    named = set(found.values()) if isinstance(found, dict) else set()
    files = [directory / name for name in sorted(named, key=str) if isinstance(name, str) and Path(name).name == name]
    if not files or len(files) < len(named) or not all(each.is_file() for each in files):
        raise _not_found("the base model has no whole weights in safetensors")
    return files


def has_weights(directory: Path) -> bool:
    """Whether every file of a whole model's weights is there."""
    try:
        return bool(weight_files(directory))
    except TrainingError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty when there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _base(source: BaseModelSource, hub_id: str, commit: str) -> tuple[Path, str]:
    """Where the base lies, and its revision. The commit that was trained on is the one that is merged into."""
    if not source.is_hub:
        directory = Path(source.location)
        if not source.location or not (directory / CONFIG).is_file() or not has_weights(directory):
            raise _not_found("the base model is gone or has no weights in safetensors")
        return directory, ""
    revision = (commit if hub_id == source.location else "") or source.revision
    return _snapshot(source.location, revision or None)


def _snapshot(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """The snapshot of a hub's model, from its cache when it is there with all weights."""
    found: Path | None = None
    try:
        found = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        found = None
    if found is None or not (found / CONFIG).is_file() or not has_weights(found):
        try:
            found = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_BASE_FILES)))
        except (OSError, ValueError, HfHubHTTPError) as error:
            if durable.is_full(error):
                raise durable.storage_full(hub_id) from error
            raise _not_found(f"the base model {hub_id} cannot be fetched: {error}".splitlines()[0]) from error
        if not has_weights(found):
            raise _not_found(f"the base model {hub_id} has no weights in safetensors")
    return found, found.name


def _outside_name(source: BaseModelSource, noted: object) -> str:
    """What the base is called where nobody knows this server's paths."""
    if source.is_hub:
        return source.location
    path = Path(source.location) if source.location else None
    if path is not None and path.resolve().is_relative_to(BUILTIN.resolve()):
        return f"builtin/{path.resolve().relative_to(BUILTIN.resolve()).parts[0]}"
    name = noted if isinstance(noted, str) else ""
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def _text(noted: dict[str, Any], key: str) -> str:
    value = noted.get(key)
    return value if isinstance(value, str) else ""


def _not_found(what: str) -> TrainingError:
    return TrainingError(
        "MODEL_NOT_FOUND",
        f"The model cannot be exported: {what}.",
        "Bring its base back to where it was, or export a model whose files are there.",
    )
