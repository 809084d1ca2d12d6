"""What lies beside the weights of an export: configuration, generation settings, tokenizer and chat template."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from luthier_trainer.data.masks.template import CHATML, template_of
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.source import CONFIG, Tuned, read_json
from luthier_trainer.save import LINEAGE
from luthier_trainer.state import STATE

GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    _TEMPLATE,
    "chat_template.json",
)
_MORE_TEMPLATES = "additional_chat_templates"


def write_tokenizer(tuned: Tuned, folder: Path) -> None:
    """The tokenizer and its chat template, byte for byte as training left them. A tokenizer without a template that was
    trained with ChatML's, whose tokens it knows, gets that one as a file."""
    for name in _TOKENIZER_FILES:
        if (tuned.directory / name).is_file():
            shutil.copyfile(tuned.directory / name, folder / name)
    if not load_tokenizer(tuned).chat_template and _trained_with(tuned) == hashlib.sha256(CHATML.encode()).hexdigest():
        (folder / _TEMPLATE).write_text(CHATML, encoding="utf-8")
    for more in sorted((tuned.directory / _MORE_TEMPLATES).glob("*.jinja")):
        (folder / _MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(more, folder / _MORE_TEMPLATES / more.name)


def _trained_with(tuned: Tuned) -> str:
    """SHA-256 of the chat template that training used, as a model or a checkpoint notes it; empty for neither."""
    rows = read_json(tuned.directory / STATE).get("rows", {})
    noted = read_json(tuned.directory / LINEAGE).get("chat_template_sha256", rows.get("template_sha256", ""))
    return noted if isinstance(noted, str) else ""


def write_config(
    config: PretrainedConfig, architecture: str, dtype: torch.dtype, folder: Path, **more: dict[str, Any]
) -> None:
    """config.json of a model of this class whose weights are of this kind, and what `more` sets, without a path of this
    machine."""
    settings = json.loads(config.to_json_string(use_diff=True)) | more
    settings["architectures"] = [architecture]
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings.pop("_name_or_path", None)
    settings.pop("auto_map", None)  # the classes are transformers' own, and nobody shall be led to foreign code
    _write(folder / CONFIG, settings)


def write_generation_config(tuned: Tuned, config: PretrainedConfig, folder: Path) -> None:
    """generation_config.json of the base, with every token that ends an answer."""
    settings = read_json(tuned.base / GENERATION)
    for name in ("bos_token_id", "pad_token_id"):
        value = getattr(config.get_text_config(), name, None)
        if value is not None:
            settings.setdefault(name, value)
    ends = end_tokens(tuned, config)
    if ends:
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    settings.pop("_from_model_config", None)  # else transformers would make it anew of config.json
    _write(folder / GENERATION, settings)


def end_tokens(tuned: Tuned, config: PretrainedConfig) -> list[int]:
    """The tokens that end an answer: the base's, the tokenizer's, and the one that the chat template writes after an
    assistant's turn."""
    tokenizer = load_tokenizer(tuned)
    ends: list[int] = []
    noted = read_json(tuned.base / GENERATION).get(
        "eos_token_id", getattr(config.get_text_config(), "eos_token_id", None)
    )
    for each in (*(noted if isinstance(noted, list) else [noted]), tokenizer.eos_token_id, end_of_turn(tokenizer)):
        if isinstance(each, int) and each not in ends:
            ends.append(each)
    return ends


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template writes after an assistant's answer; None without a template, and for one that
    writes none there."""
    answer = "An answer."
    try:
        template = template_of(tokenizer)
        if not template.source or not template.ends:
            return None
        turns: Any = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
        text, _ = template.render(turns)
    except TrainingError:
        return None
    _, found, after = text.rpartition(answer)
    match = template.turn_end.search(after) if found else None
    if match is None:
        return None
    token = tokenizer.convert_tokens_to_ids(match[0])
    return token if isinstance(token, int) else None


def load_tokenizer(tuned: Tuned) -> PreTrainedTokenizerBase:
    """The tokenizer that the model was trained with. Raises TrainingError MODEL_NOT_FOUND."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            tuned.directory, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        message = f"The tokenizer of {tuned.name} cannot be loaded: {error}".splitlines()[0]
        raise TrainingError("MODEL_NOT_FOUND", message) from error
    return tokenizer


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
