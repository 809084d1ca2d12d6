"""The whole model as one GGUF file, written tensor by tensor."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFType, GGUFWriter
from transformers import AutoConfig

from luthier.v1.export_task_pb2 import GGUF_TYPE_UNSPECIFIED, GgufExport, GgufType
from luthier_trainer.export.gguf import types
from luthier_trainer.export.gguf.families import Planned, family_of, key_heads, plan
from luthier_trainer.export.gguf.metadata import describe_model, describe_origin, describe_types
from luthier_trainer.export.gguf.modelfile import write_modelfile
from luthier_trainer.export.gguf.quantize import Slabs
from luthier_trainer.export.gguf.tokenizer import require_rows, template_of_model, vocabulary_of
from luthier_trainer.export.merge import MergedWeights, merged_weights
from luthier_trainer.export.source import Tuned
from luthier_trainer.export.surroundings import end_tokens, load_tokenizer
from luthier_trainer.stop import Check

_EMBEDDING = "token_embd.weight"


def require_model(tuned: Tuned, check: Check) -> None:
    """Raises TrainingError EXPORT_UNSUPPORTED for a family, a weight or a tokenizer that llama.cpp does not have."""
    family_of(AutoConfig.from_pretrained(tuned.base, trust_remote_code=False, local_files_only=True))
    with merged_weights(tuned) as weights:
        rows = _rows(_planned(weights))
        config = weights.config
    require_rows(vocabulary_of(tuned, config, rows, check))


def file_name(asked: GgufType.ValueType) -> str:
    """The file's name, such as `model-q4_k_m.gguf`."""
    kind = "f16" if asked == GGUF_TYPE_UNSPECIFIED else GgufType.Name(asked).removeprefix("GGUF_TYPE_").lower()
    return f"model-{kind}.gguf"


def write_model(
    tuned: Tuned, options: GgufExport, folder: Path, progress: Callable[[int, int], None], check: Check
) -> list[str]:
    """Writes the file and its Modelfile. Returns what a user should know. One tensor in 32 bits and a few slabs of it
    are in memory at a time. Raises as `require_model`, and for numbers that the type cannot hold."""
    with merged_weights(tuned) as weights:
        config = weights.config
        family = family_of(config)
        planned = _planned(weights)
        vocabulary = vocabulary_of(tuned, config, _rows(planned), check)
        require_rows(vocabulary)
        model = types.Model(
            family.architecture, config.num_hidden_layers, config.num_attention_heads, key_heads(config)
        )
        mix = types.mix(options.type, model, [(each.name, each.shape) for each in planned])
        path = folder / file_name(options.type)
        writer = GGUFWriter(path, family.architecture)
        writer.add_type(GGUFType.MODEL)
        describe_origin(writer, tuned, sum(math.prod(each.shape) for each in planned))
        notes = describe_model(writer, family, config, _rows(planned))
        vocabulary.add_to(writer)
        describe_types(writer, mix.file_type)
        for each in planned:
            kind = mix.types[each.name]
            # the shape of quantised tensors is given in numbers, not in bytes
            writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), _size(each, kind), kind)
        begin(writer)
        with path.open("ab") as file, Slabs(torch.get_num_threads(), check) as slabs:
            _append(file.write, weights, planned, mix, slabs, writer.data_alignment, progress)
    ends = [vocabulary.tokens[each] for each in end_tokens(tuned, config) if each < len(vocabulary.tokens)]
    notes += vocabulary.notes
    notes += _fallback_notes(options.type, mix)
    write_modelfile(folder, f"FROM ./{path.name}", template_of_model(load_tokenizer(tuned)), ends, notes)
    return notes


def begin(writer: GGUFWriter) -> None:
    """Writes all that comes before the tensors, up to where they begin."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    writer.close()


def _planned(weights: MergedWeights) -> list[Planned]:
    return plan(weights.config, {name: weights.shape(name) for name in weights.names})


def _rows(planned: Sequence[Planned]) -> int:
    return next(each.shape[0] for each in planned if each.name == _EMBEDDING)


def _size(tensor: Planned, kind: types.Type) -> int:
    return math.prod(tensor.shape[:-1]) * types.row_bytes(kind, tensor.shape[-1])


def _append(
    append: Callable[[memoryview | bytes], int],
    weights: MergedWeights,
    planned: Sequence[Planned],
    mix: types.Mix,
    slabs: Slabs,
    alignment: int,
    progress: Callable[[int, int], None],
) -> None:
    """Writes the tensors, each filled up to the alignment, as llama.cpp does after the last as well."""
    total = sum(_size(each, mix.types[each.name]) for each in planned)
    done = 0
    for each in planned:
        value = weights.read(each.source, torch.float32) if each.value is None else each.value
        written = 0
        for part in slabs.of(
            each.source or each.name, value, mix.types[each.name], each.rows, each.factor, each.offset
        ):
            written += append(part)
            progress(done + written, total)
        del value
        append(bytes(-written % alignment))
        done += written


def _fallback_notes(asked: GgufType.ValueType, mix: types.Mix) -> list[str]:
    """What llama.cpp warns of as well: rows that cannot be cut into blocks."""
    if not mix.fallbacks:
        return []
    kinds = sorted({re.sub(r"\d+", "N", name) for name in mix.fallbacks})
    used = sorted({mix.types[name].name for name in mix.fallbacks})
    return [
        f"The rows of {len(mix.fallbacks)} tensors ({', '.join(kinds)}) cannot be cut into the blocks of "
        f"{GgufType.Name(asked).removeprefix('GGUF_TYPE_')}: they are held as {', '.join(used)}, "
        "and the file is larger."
    ]
