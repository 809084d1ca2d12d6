"""The merged model in 4 bits a weight, bitsandbytes' NF4 (Dettmers et al. 2023, arXiv 2305.14314)."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from luthier.v1 import export_task_pb2
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.merge import MergedWeights, merged_weights
from luthier_trainer.export.merged import MAX_SHARD_BYTES, kinds_of, made, plan, require_finite, write_index
from luthier_trainer.export.source import Tuned
from luthier_trainer.export.stored import Progress, unsupported
from luthier_trainer.export.surroundings import write_config, write_generation_config, write_tokenizer
from luthier_trainer.export.tensor_file import Gathered, Stored, shard_names
from luthier_trainer.model import no_progress_bar
from luthier_trainer.stop import Check


def write_nf4(
    tuned: Tuned, options: export_task_pb2.MergedExport, folder: Path, progress: Progress, check: Check
) -> None:
    """Writes the merged model as transformers loads it with bitsandbytes: linear weights but the head's in NF4 with
    double quantisation, everything else in bfloat16. They are merged, rounded to bfloat16, quantised and written one by
    one.

    Raises TrainingError QUANTIZATION_UNAVAILABLE without bitsandbytes, else as `write_merged`.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "QUANTIZATION_UNAVAILABLE",
            "An export in nf4 needs bitsandbytes, which is not installed beside the trainer.",
            "Install it there (pip install bitsandbytes), or export in bf16.",
        )
    how = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    limit = options.max_shard_bytes or MAX_SHARD_BYTES
    with merged_weights(tuned) as weights:
        write_tokenizer(tuned, folder)
        settings: dict[str, Any] = how.to_dict()
        write_config(weights.config, type(weights.model).__name__, torch.bfloat16, folder, quantization_config=settings)
        write_generation_config(tuned, weights.config, folder)
        _write_files(_tensors(weights, _layers(weights.config, how), progress, check), limit, folder)


def _layers(config: PretrainedConfig, how: BitsAndBytesConfig) -> dict[str, torch.nn.Module]:
    """bitsandbytes' layers of a model as transformers will load it, by the names of their weights."""
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    with torch.device("meta"), no_progress_bar():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)  # type: ignore[no-untyped-call]
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=how)
    return {f"{name}.weight": each for name, each in model.named_modules() if isinstance(each, Linear4bit)}


def _tensors(
    weights: MergedWeights, layers: dict[str, torch.nn.Module], progress: Progress, check: Check
) -> Iterator[dict[str, torch.Tensor]]:
    """What the files hold, by name, a weight or a group of weights at a time."""
    from bitsandbytes.functional import quantize_4bit

    kinds = kinds_of(weights, torch.bfloat16)
    planned, group_of = plan(weights, kinds)
    total = sum(each.size_bytes for each in planned.values())
    done = 0
    progress(0, total)
    for group in dict.fromkeys(group_of.values()):
        check()
        names = [name for name, each in group_of.items() if each == group]
        if not layers.keys() & set(group):
            yield made(weights, group, kinds)
        elif len(group) > 1 or len(names) > 1:
            raise unsupported(f"{group[0]} is no weight of its own in the model's files", "Export it in bf16.")
        else:
            layer: Any = layers[group[0]]
            weight = weights.read(group[0], torch.bfloat16)
            require_finite(group[0], weight)
            if issubclass(layer.source_cls, Conv1D):
                weight = weight.T
            packed, state = quantize_4bit(
                weight.contiguous(),
                blocksize=layer.weight.blocksize,
                compress_statistics=layer.weight.compress_statistics,
                quant_type=layer.weight.quant_type,
            )
            notes = state.as_dict(packed=True)
            yield {names[0]: packed} | {f"{names[0]}.{key}": each for key, each in notes.items()}
        done += sum(planned[name].size_bytes for name in names)
        progress(done, total)


def _write_files(groups: Iterator[dict[str, torch.Tensor]], limit: int, folder: Path) -> None:
    """Writes files of at most `limit` bytes. How many there are, and so what they are called, is known at the end."""
    files: list[dict[str, Stored]] = []
    with contextlib.ExitStack() as stack:
        gathered = stack.enter_context(Gathered(folder))
        for group in groups:
            if gathered.size_bytes and gathered.size_bytes + sum(each.nbytes for each in group.values()) > limit:
                files.append(gathered.write(folder / f"part-{len(files)}"))
            for name, each in group.items():
                gathered.add(name, each)
        files.append(gathered.write(folder / f"part-{len(files)}"))
    for number, name in enumerate(shard_names(len(files))):
        (folder / f"part-{number}").rename(folder / name)
    if len(files) > 1:
        write_index(folder, files)
