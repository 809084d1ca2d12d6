"""What `export_model` takes: the forms in which a model is written, and where a copy goes.

client.export_model("support-bot@production", exports.gguf("q4_k_m"))
client.export_model(model_id, exports.merged("bf16"), destination=exports.destination("hf://me/bot", secret="hub"))
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from luthier.v1.export_task_pb2 import (
    AdapterExport,
    ExportDestination,
    ExportTask,
    GgufExport,
    GgufType,
    MergedExport,
    WeightType,
)
from luthier_client import enums

Format: TypeAlias = AdapterExport | MergedExport | GgufExport
"""The form in which a model is written."""

_FULL_NAMES: Mapping[str, str] = {"fp16": "f16", "fp32": "f32", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def adapter() -> AdapterExport:
    """The adapter alone, as PEFT loads it."""
    return AdapterExport()


def merged(weights: str = "bf16", *, max_shard_bytes: int | None = None) -> MergedExport:
    """The whole model, as transformers loads it: `bf16`, `f16`, `f32`, or `nf4` (4 bits a weight, bitsandbytes).

    `max_shard_bytes`: bytes of a file of weights at most. Raises ValueError for a number format that is none.
    """
    number = enums.number(WeightType.DESCRIPTOR, _FULL_NAMES.get(weights.lower(), weights))
    return MergedExport(weights=WeightType.ValueType(number), max_shard_bytes=max_shard_bytes)


def gguf(type: str = "f16", *, adapter_only: bool = False) -> GgufExport:
    """A GGUF file for llama.cpp and Ollama: `f16`, `bf16`, `q8_0`, `q6_k`, `q5_k_m`, `q4_k_m`, `q3_k_m` or `q2_k`.

    With `adapter_only` the adapter alone, for use with a GGUF of its base; it is f16. Raises ValueError for a type that
    is none.
    """
    number = enums.number(GgufType.DESCRIPTOR, _FULL_NAMES.get(type.lower(), type))
    return GgufExport(type=GgufType.ValueType(number), adapter_only=adapter_only)


def destination(uri: str, *, secret: str = "", public: bool = False) -> ExportDestination:
    """Where a copy goes: `s3://`, `gs://`, `az://`, `file://`, or `hf://owner/name` for a repository of the Hub.

    `secret` names a secret that the operator configured; the credentials themselves are never sent. `public`: a
    repository of the Hub that does not exist yet is made public.
    """
    return ExportDestination(uri=uri, credentials_secret=secret, public=public)


def task(
    model: str,
    format: Format,
    *,
    proof_dataset: str = "",
    proof_rows: int | None = None,
    to: ExportDestination | str | None = None,
) -> ExportTask:
    """The whole of what is asked for. Raises TypeError for a format that is none of the above."""
    made = ExportTask(model=model, proof_dataset=proof_dataset, proof_rows=proof_rows)
    if isinstance(format, AdapterExport):
        made.adapter.CopyFrom(format)
    elif isinstance(format, MergedExport):
        made.merged.CopyFrom(format)
    elif isinstance(format, GgufExport):
        made.gguf.CopyFrom(format)
    else:
        raise TypeError(f"a format is exports.adapter(), merged() or gguf(), not {format!r}")
    if to is not None:
        made.destination.CopyFrom(destination(to) if isinstance(to, str) else to)
    return made


def describe(asked: ExportTask) -> str:
    """The form in a few words: `adapter`, `merged bf16`, `gguf q4_k_m`, `gguf f16 adapter`."""
    kind: Any = asked.WhichOneof("format")
    if kind == "merged":
        weights = asked.merged.weights or WeightType.WEIGHT_TYPE_BF16
        return f"merged {enums.short(WeightType.DESCRIPTOR, weights)}"
    if kind == "gguf":
        held = enums.short(GgufType.DESCRIPTOR, asked.gguf.type or GgufType.GGUF_TYPE_F16)
        return f"gguf {held}{' adapter' if asked.gguf.adapter_only else ''}"
    return kind or ""
