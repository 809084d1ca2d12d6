"""A model's card: Markdown, with the metadata that the Hugging Face Hub reads at its top.

Names, descriptions and tags are other people's words: in the metadata they are double-quoted YAML, in the text escaped
Markdown, in programs Python literals, so none of them is ever read as more than a text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from luthier_server.licences import HUB_LICENCES
from luthier_server.store.models import Model

_HUB_ID = re.compile(r"(?=.{1,96}\Z)(?:\w(?:[\w.-]*\w)?/)?\w(?:[\w.-]*\w)?", re.ASCII)
_PLAIN = re.compile(r"[\w.@:/+,= -]{1,200}", re.ASCII)
_MARKUP = re.compile(r"([\\`*_{}\[\]()#!~$])")
_BLOCK_START = re.compile(r"\A(\d*)([-+=.)])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"}
_LONGEST = 4096


class Form(StrEnum):
    """What lies beside the card."""

    ADAPTER = "adapter"
    WHOLE = "whole"
    GGUF = "gguf"
    GGUF_ADAPTER = "gguf adapter"


_ADAPTERS = frozenset({Form.ADAPTER, Form.GGUF_ADAPTER})


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Rows that a model was trained or evaluated on. role: `training` or `validation`; hub_id: the dataset of the Hub
    that they came from, empty for none; rows: 0 when unknown."""

    role: str
    id: str
    name: str
    sha256: str
    rows: int
    hub_id: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a card tells of. made: the model's `luthier.json`, which may be empty; base: the model at the root, of which
    everything else is a continuation; parents: the models in between, nearest first."""

    model: Model
    made: Mapping[str, Any]
    base: str
    data: Sequence[TrainingData]
    parents: Sequence[str] = ()


def is_hub_id(text: str) -> bool:
    """Whether this could name a repository of the Hub; old ones have no owner."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def form_of(model: Model) -> Form:
    """What a model's own directory holds."""
    return Form.WHOLE if model.adaptation == "full" else Form.ADAPTER


def card(subject: Subject, form: Form) -> str:
    """The card of a model, or of what it was exported to."""
    parts = [
        *_metadata(subject, form),
        "",
        f"# {text(subject.model.name)}",
        "",
        *_introduction(subject, form),
        *_use(subject, form),
        *_data(subject),
        *_settings(subject),
        *_results(subject),
        *_making(subject),
        *_origins(subject),
    ]
    return "\n".join(parts) + "\n"


def quoted(value: str) -> str:
    """A text as a double-quoted scalar of YAML 1.2, on one line, of printable characters."""
    escaped = json.dumps(value[:_LONGEST], ensure_ascii=False)
    return "".join(each if each.isprintable() else _escape(ord(each)) for each in escaped)


def _escape(code: int) -> str:
    if 0xD800 <= code <= 0xDFFF:
        return "\\uFFFD"  # half of a surrogate pair is no character
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def text(value: object) -> str:
    """A text as one line of Markdown that says just that."""
    shown = "".join(each if each.isprintable() else " " for each in str(value)[:_LONGEST])
    escaped = _MARKUP.sub(r"\\\1", " ".join(shown.split()))
    escaped = "".join(_ENTITIES.get(each, each) for each in escaped)
    return _BLOCK_START.sub(r"\1\\\2", escaped)


def code(value: object) -> str:
    """A name as a code span, where its characters allow that, else as escaped text."""
    return f"`{value}`" if _PLAIN.fullmatch(str(value)) else text(value)


def literal(value: str) -> str:
    """A text as a literal of Python that ends no code block."""
    return ascii(value[:_LONGEST]).replace("`", "\\x60")


def _metadata(subject: Subject, form: Form) -> Iterator[str]:
    base = _hub_base(subject)
    yield "---"
    if base:
        yield f"base_model: {quoted(base)}"
        yield f"base_model_relation: {'adapter' if form in _ADAPTERS else 'finetune'}"
    yield f"library_name: {_library(form)}"
    if licence := subject.model.base_licence.lower():
        if licence in HUB_LICENCES:
            yield f"license: {quoted(licence)}"
        else:
            yield "license: other"
            yield f"license_name: {quoted(re.sub(r'[^a-z0-9.-]+', '-', licence).strip('-') or 'unknown')}"
    yield "pipeline_tag: text-generation"
    if hub_ids := sorted({each.hub_id for each in subject.data if each.role == "training" and is_hub_id(each.hub_id)}):
        yield "datasets:"
        yield from (f"- {quoted(each)}" for each in hub_ids)
    yield "tags:"
    yield from (f"- {each}" for each in ("luthier", "sft", "full-fine-tuning" if _is_full(subject) else "lora"))
    yield "---"


def _library(form: Form) -> str:
    return {Form.ADAPTER: "peft", Form.WHOLE: "transformers"}.get(form, "gguf")


def _is_full(subject: Subject) -> bool:
    return subject.model.adaptation == "full"


def _hub_base(subject: Subject) -> str:
    """The base model's repository of the Hub; empty for one that lies elsewhere."""
    noted = str(_made(subject, "base_model", "hub_id") or "")
    if noted:
        return noted if is_hub_id(noted) else ""
    is_elsewhere = subject.base.startswith(("builtin/", "/", "model_"))
    return subject.base if is_hub_id(subject.base) and not is_elsewhere else ""


def _shown(base: str) -> str:
    """A base as others may see it: of a directory on the server its last name alone, for cards are published."""
    return (base.rstrip("/").rpartition("/")[2] or "/") if base.startswith("/") else base


def _made(subject: Subject, *keys: str) -> object:
    """What `luthier.json` says below these keys; None for nothing."""
    found: object = subject.made
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _introduction(subject: Subject, form: Form) -> Iterator[str]:
    model = subject.model
    base = _hub_base(subject)
    named = f"[{text(base)}](https://huggingface.co/{base})" if base else code(_shown(subject.base))
    task = model.resolved_spec.fine_tune if model.resolved_spec is not None else None
    if _is_full(subject):
        what = f"All weights of {named}"
        if task is not None and task.full.train_last_layers:
            what = f"{named}, of which the last {task.full.train_last_layers} layers were trained"
    else:
        rank = f" of rank {task.lora.rank}" if task is not None and task.lora.rank else ""
        what = f"A LoRA adapter{rank} for {named}"
        if form not in _ADAPTERS:
            what = f"{named} with a LoRA adapter{rank} merged into it"
    yield f"{what}, fine-tuned with Luthier."
    if model.description:
        yield ""
        yield text(model.description)


def _use(subject: Subject, form: Form) -> Iterator[str]:
    yield from ("", "## Use", "")
    if form == Form.GGUF_ADAPTER:
        yield (
            "With a GGUF of its base: llama.cpp (`llama-cli -m BASE.gguf --lora FILE.gguf`), or Ollama by the Modelfile"
            " beside it, once that names the base (`ollama create`)."
        )
        return
    if form == Form.GGUF:
        yield "With llama.cpp (`llama-cli -m FILE.gguf`), or with Ollama by the Modelfile beside it (`ollama create`)."
        return
    yield "`DIRECTORY` is where these files lie, or the repository that they were published to."
    yield from ("", "```python")
    if form == Form.ADAPTER:
        revision = subject.model.base_model_revision
        pinned = f", revision={literal(revision)}" if revision and _hub_base(subject) else ""
        is_builtin = subject.base.startswith("builtin/")
        if is_builtin:
            yield from ("from importlib.resources import files  # the base comes with luthier-trainer", "")
        yield "from peft import PeftModel"
        yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
        yield ""
        if is_builtin:
            base = f'files("luthier_trainer") / {literal(subject.base)}'
        else:
            base = literal(_hub_base(subject) or _shown(subject.base))
        yield f"base = AutoModelForCausalLM.from_pretrained({base}{pinned})"
        yield 'model = PeftModel.from_pretrained(base, "DIRECTORY")'
    else:
        yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
        yield ""
        yield 'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")'
    yield 'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")'
    yield 'messages = [{"role": "user", "content": "Hello"}]'
    yield (
        "inputs = tokenizer.apply_chat_template("
        'messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
    )
    yield "answer = model.generate(**inputs, max_new_tokens=128)"
    yield 'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))'
    yield "```"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if not rows:
        return
    yield from ("", f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|")
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _data(subject: Subject) -> Iterator[str]:
    rows = [
        [each.role, code(each.name or each.id), f"{each.rows:,}" if each.rows else "", code(each.sha256)]
        for each in subject.data
    ]
    yield from _table("Training data", ("for", "dataset", "rows", "SHA-256"), rows)


def _settings(subject: Subject) -> Iterator[str]:
    """What the spec says of the optimisation, every default included."""
    spec = subject.model.resolved_spec
    if spec is None:
        return
    task = spec.fine_tune
    rows: list[list[str]] = []
    for part in (task.full if _is_full(subject) else task.lora, task.hyperparameters, task.tokenization):
        for field, value in part.ListFields():
            if field.name in ("chat_template", "response_template"):
                continue
            if field.enum_type is not None:
                numbers = value if field.is_repeated else [value]
                shown = ", ".join(_enum(field.enum_type, number) for number in numbers)
            elif field.is_repeated:
                shown = ", ".join(str(each) for each in value)
            else:
                shown = f"{value:g}" if isinstance(value, float) else str(value)
            rows.append([code(field.name), code(shown)])
    if isinstance(rate := _made(subject, "learning_rate"), float) and not task.hyperparameters.learning_rate:
        rows.append([code("learning_rate"), f"`{rate:g}`, by a range test"])
    rows.append([code("steps"), f"`{subject.model.step}`"])
    yield from _table("Hyperparameters", ("setting", "value"), rows)


def _enum(kind: Any, number: int) -> str:
    """An enum's value as YAML jobs write it: `LR_SCHEDULER_COSINE` is `cosine`."""
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.name).upper() + "_"
    known = kind.values_by_number.get(number)
    return str(known.name).removeprefix(prefix).lower() if known is not None else str(number)


def _results(subject: Subject) -> Iterator[str]:
    metrics = subject.model.metrics
    is_evaluation = {name: name.startswith(("eval", "best")) for name in metrics}
    for title, wanted in (("Evaluation", True), ("Metrics of training", False)):
        rows = [[code(name), f"{metrics[name]:.6g}"] for name in sorted(metrics) if is_evaluation[name] == wanted]
        yield from _table(title, ("metric", "value"), rows)


def _making(subject: Subject) -> Iterator[str]:
    template = _made(subject, "chat_template_sha256")
    if isinstance(template, str) and template:
        yield from ("", "## Chat template", "")
        yield f"Rows were rendered with the chat template that lies beside the tokenizer, SHA-256 {code(template)}."
    libraries = _made(subject, "libraries")
    if isinstance(libraries, Mapping):
        rows = [[code(name), code(version)] for name, version in sorted(libraries.items())]
        yield from _table("Versions", ("library", "version"), rows)


def _origins(subject: Subject) -> Iterator[str]:
    model = subject.model
    rows = [
        ["model", code(model.id)],
        ["checkpoint", code(model.checkpoint)],
        ["job", code(model.job_id)],
        *(["goes on from", code(each)] for each in subject.parents),
        ["base model", code(_shown(subject.base))],
        ["its revision", code(model.base_model_revision)],
        ["its licence", code(model.base_licence)],
        *(["version", code(f"{each.name}@{each.version}")] for each in model.versions),
        *(["tag", f"{code(key)} {code(value)}"] for key, value in model.tags.items()),
    ]
    yield from _table("Lineage", ("what", "which"), [row for row in rows if row[1]])
