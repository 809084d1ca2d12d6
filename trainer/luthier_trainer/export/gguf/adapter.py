"""A LoRA adapter alone, as llama.cpp loads it beside a GGUF of its base.

The file's layout is that of llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp: `NAME.lora_a` and
`NAME.lora_b` beside the base's tensor NAME, and alpha in the metadata; llama.cpp multiplies by alpha / rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType
from transformers import AutoConfig, PretrainedConfig

from luthier.v1.export_task_pb2 import GGUF_TYPE_F16, GgufExport
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.gguf import types
from luthier_trainer.export.gguf.families import Planned, family_of, plan
from luthier_trainer.export.gguf.metadata import describe_origin, describe_types
from luthier_trainer.export.gguf.model import begin
from luthier_trainer.export.gguf.modelfile import write_modelfile
from luthier_trainer.export.gguf.quantize import Slabs
from luthier_trainer.export.gguf.tokenizer import template_of_model
from luthier_trainer.export.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tuned, read_json
from luthier_trainer.export.surroundings import end_tokens, load_tokenizer
from luthier_trainer.export.tensor_file import Stored, TensorFile
from luthier_trainer.stop import Check

FILE = "adapter-f16.gguf"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDINGS = (".lora_embedding_A", ".lora_embedding_B")
_KIND = GGMLQuantizationType.F16


@dataclass(frozen=True)
class _Pair:
    """The two factors of a tensor's change. tensor: where it lies in the base's file; a, b: the adapter's own names."""

    tensor: Planned
    a: str
    b: str


def require_adapter(tuned: Tuned, options: GgufExport) -> None:
    """Raises TrainingError EXPORT_UNSUPPORTED for what is no adapter, or one that llama.cpp does not load: with whole
    modules, DoRA, ranks that differ, biases; and for a type that is not f16."""
    if options.type > GGUF_TYPE_F16:
        raise _unsupported("it is written in 16 bits, and another type is asked for", "Leave the type away.")
    if tuned.adapter is None:
        raise _unsupported("the model was fully fine-tuned and has no adapter", "Export the whole model.")
    settings = read_json(tuned.adapter / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise _unsupported(f"its adapter is of the type {settings.get('peft_type')}")
    refused = {
        "use_dora": "DoRA, which scales whole rows",
        "modules_to_save": "modules that are saved whole",
        "lora_bias": "biases of its own",
        "rank_pattern": "ranks that differ from one module to another",
        "alpha_pattern": "alphas that differ from one module to another",
        "target_parameters": "changes of single parameters",
        "trainable_token_indices": "changes of single tokens",
    }
    for key, what in refused.items():
        if settings.get(key):
            raise _unsupported(f"its adapter has {what} ({key})")
    if settings.get("bias", "none") != "none":
        raise _unsupported(f"its adapter has biases of its own (bias: {settings['bias']})")
    with TensorFile(tuned.adapter / ADAPTER_WEIGHTS) as file:
        _pairs(_config(tuned), file.tensors)


def write_adapter(
    tuned: Tuned, options: GgufExport, folder: Path, progress: Callable[[int, int], None], check: Check
) -> None:
    """Writes the adapter and a Modelfile that wants the base's name filled in. Raises as `require_adapter`."""
    require_adapter(tuned, options)
    assert tuned.adapter is not None
    config = _config(tuned)
    family = family_of(config)
    with TensorFile(tuned.adapter / ADAPTER_WEIGHTS) as file:
        halves = [half for pair in _pairs(config, file.tensors) for half in _halves(pair, file.tensors)]
        writer = GGUFWriter(folder / FILE, family.architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", _alpha(read_json(tuned.adapter / ADAPTER_CONFIG)))
        describe_origin(writer, tuned, 0)
        describe_types(writer, LlamaFileType.MOSTLY_F16)
        for each in halves:
            size = math.prod(each.shape[:-1]) * types.row_bytes(_KIND, each.shape[-1])
            writer.add_tensor_info(each.name, each.shape, np.dtype(np.float16), size, _KIND)
        begin(writer)
        total = sum(math.prod(each.shape) * 2 for each in halves)
        done = 0
        with (folder / FILE).open("ab") as output, Slabs(torch.get_num_threads(), check) as slabs:
            for each in halves:
                value = file.read(each.source).float()
                for part in slabs.of(each.source, value, _KIND, each.rows, each.factor):
                    done += output.write(part)
                    progress(done, total)
                output.write(bytes(-output.tell() % writer.data_alignment))
    tokenizer = load_tokenizer(tuned)
    ends = tokenizer.convert_ids_to_tokens(end_tokens(tuned, config))
    base = " ".join(tuned.base_name.split()) or "the base model"  # one line: what follows are instructions
    write_modelfile(
        folder,
        f"# Put a GGUF of {base} here, one that was made of the weights that the adapter was trained on.\n"
        f"FROM ./base.gguf\nADAPTER ./{FILE}",
        template_of_model(tokenizer),
        [each for each in ends if isinstance(each, str)],
    )


def _halves(pair: _Pair, stored: Mapping[str, Stored]) -> tuple[Planned, Planned]:
    """Both factors as tensors of the file. What reorders or scales the rows of W does it to those of B."""
    tensor = pair.tensor
    return (
        Planned(f"{tensor.name}.lora_a", pair.a, stored[pair.a].shape),
        Planned(f"{tensor.name}.lora_b", pair.b, stored[pair.b].shape, tensor.rows, factor=tensor.factor),
    )


def _pairs(config: PretrainedConfig, stored: Mapping[str, Stored]) -> list[_Pair]:
    """The adapter's tensors by two. Raises TrainingError EXPORT_UNSUPPORTED for others."""
    sources: dict[str, tuple[str, str]] = {}
    for name in stored:
        if name.startswith(_PREFIX) and name.endswith(_A):
            module = name.removesuffix(_A)
            sources[f"{module.removeprefix(_PREFIX)}.weight"] = name, f"{module}{_B}"
    left = stored.keys() - {each for pair in sources.values() for each in pair}
    if left:
        embedding = any(each.endswith(_EMBEDDINGS) for each in left)
        what = "changes of the embeddings" if embedding else f"{min(left)}, which is no part of a plain LoRA"
        raise _unsupported(f"its adapter has {what}")
    for _, b in sources.values():
        if b not in stored:
            raise _unsupported(f"its adapter lacks {b}")
    shapes = {source: (stored[b].shape[0], stored[a].shape[1]) for source, (a, b) in sources.items()}
    planned = [each for each in plan(config, shapes) if each.source]
    if config.tie_word_embeddings and any(each.name == "output.weight" for each in planned):
        raise _unsupported("it changes the head, and a GGUF of its base has none but its embeddings")
    return [_Pair(each, *sources[each.source]) for each in planned]


def _alpha(settings: dict[str, object]) -> float:
    """What llama.cpp divides by the rank: with rslora alpha over the root of the rank is meant."""
    alpha, rank = float(str(settings["lora_alpha"])), float(str(settings["r"]))
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _config(tuned: Tuned) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(tuned.base, trust_remote_code=False, local_files_only=True)
    return config


def _unsupported(why: str, hint: str = "Export the whole model as GGUF: its adapter is merged then.") -> TrainingError:
    return TrainingError("EXPORT_UNSUPPORTED", f"The adapter cannot be written alone as GGUF: {why}.", hint)
