"""The whole model in safetensors, the adapter merged into its base."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from luthier.v1 import export_task_pb2
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.merge import MergedWeights, merged_weights
from luthier_trainer.export.source import Tuned
from luthier_trainer.export.stored import Progress, on_file, require_loadable, unsupported
from luthier_trainer.export.surroundings import write_config, write_generation_config, write_tokenizer
from luthier_trainer.export.tensor_file import Stored, TensorFileWriter, in_writing_order, shard_names, shards
from luthier_trainer.stop import Check

MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {
    export_task_pb2.WEIGHT_TYPE_UNSPECIFIED: torch.bfloat16,
    export_task_pb2.WEIGHT_TYPE_BF16: torch.bfloat16,
    export_task_pb2.WEIGHT_TYPE_F16: torch.float16,
    export_task_pb2.WEIGHT_TYPE_F32: torch.float32,
}


def write_merged(
    tuned: Tuned, options: export_task_pb2.MergedExport, folder: Path, progress: Progress, check: Check
) -> None:
    """Writes the merged model as transformers loads it. Weights are in files of at most `options.max_shard_bytes`,
    under the names that the base's files use; none of them is in memory as a whole.

    Raises TrainingError EXPORT_UNSUPPORTED, also for a number that 16-bit floating point cannot hold; MODEL_NOT_FOUND,
    MODEL_DAMAGED; and what `check` raises, between two weights.
    """
    dtype = _DTYPES[options.weights]
    limit = options.max_shard_bytes or MAX_SHARD_BYTES
    with merged_weights(tuned) as weights:
        write_tokenizer(tuned, folder)
        write_config(weights.config, type(weights.model).__name__, dtype, folder)
        write_generation_config(tuned, weights.config, folder)
        _write_weights(weights, dtype, limit, folder, progress, check)


def _write_weights(
    weights: MergedWeights, dtype: torch.dtype, limit: int, folder: Path, progress: Progress, check: Check
) -> None:
    kinds = kinds_of(weights, dtype)
    planned, group_of = plan(weights, kinds)
    files = [in_writing_order(each) for each in shards(planned, limit)]
    total = sum(each.size_bytes for each in planned.values())
    done = 0
    progress(0, total)
    ready: dict[str, torch.Tensor] = {}
    for name, file in zip(shard_names(len(files)), files, strict=True):
        with TensorFileWriter(folder / name, file) as writer:
            for tensor, stored in file.items():
                check()
                if tensor not in ready:
                    ready.update(made(weights, group_of[tensor], kinds))
                writer.write(tensor, ready.pop(tensor))
                done += stored.size_bytes
                progress(done, total)
    if len(files) > 1:
        write_index(folder, files)


def kinds_of(weights: MergedWeights, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The kind that each weight is written in. Some models hold certain weights in 32 bits whatever the others are;
    transformers would widen them again, but not bring back what was rounded."""
    return {name: weights.stored(name, dtype).dtype for name in weights.names} | weights.kept_wide(dtype)


def plan(
    weights: MergedWeights, kinds: Mapping[str, torch.dtype]
) -> tuple[dict[str, Stored], dict[str, tuple[str, ...]]]:
    """What the files will hold, and the group of weights that each of it is made from."""
    planned: dict[str, Stored] = {}
    group_of: dict[str, tuple[str, ...]] = {}
    for group in weights.groups():
        empty = {name: torch.empty(weights.shape(name), dtype=kinds[name], device="meta") for name in group}
        for name, tensor in on_file(weights.model, empty).items():
            if name in planned:
                raise unsupported(f"two weights would be written as {name}")
            planned[name] = Stored(tensor.dtype, tuple(tensor.shape))
            group_of[name] = group
    expected = {name: Stored(kinds[name], weights.shape(name)) for name in weights.names}
    require_loadable(weights.model, planned, expected)
    return planned, group_of


def made(weights: MergedWeights, group: tuple[str, ...], kinds: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """The weights of a group as the files hold them."""
    tensors = {}
    for name in group:
        tensors[name] = weights.read(name, kinds[name])
        require_finite(name, tensors[name])
    return on_file(weights.model, tensors)


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """16-bit floating point ends at 65,504, and rounding makes infinity of what lies above."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return
    low, high = torch.aminmax(tensor)  # without a second tensor, as isfinite has
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return
    kind = str(tensor.dtype).removeprefix("torch.")
    raise TrainingError(
        "EXPORT_UNSUPPORTED",
        f"{name} has a number that {kind} cannot hold, or one that is none.",
        "Export it in bf16 or f32." if tensor.dtype == torch.float16 else "The model's training went wrong.",
    )


def write_index(folder: Path, files: list[dict[str, Stored]]) -> None:
    """The index that tells transformers which file holds which tensor."""
    total = sum(each.size_bytes for file in files for each in file.values())
    where = {tensor: name for name, file in zip(shard_names(len(files)), files, strict=True) for tensor in sorted(file)}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
