"""A model's files, read as its modules call their weights.

transformers 5 computes with other names and shapes than files have: a prefix is dropped, experts that lie apart are one
tensor. The same rules, transformers' own, are followed here for one tensor at a time, and backwards to write the files
as they were.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from luthier_trainer.errors import TrainingError
from luthier_trainer.export.tensor_file import Stored, TensorFile

Progress = Callable[[int, int], None]
"""Takes what is done, and what there is in all."""


@dataclass
class Group:
    """Tensors of files that become weights of modules together. Most groups are one tensor and one weight of the same
    name.

    transform: what transformers makes the weights with. sources: (the pattern of `transform` that found it, its name in
    the files), in order. weights: what comes out, by its module's name.
    """

    transform: WeightRenaming | WeightConverter
    sources: list[tuple[str, str]] = field(default_factory=list)
    weights: dict[str, Stored] = field(default_factory=dict)


class StoredWeights:
    """The weights of a model in safetensors files. `model` is the model on the meta device; it learns which rules were
    used, so that `on_file` undoes those and no others. groups: how files become weights; weights: those, by the
    modules' names.

    Raises TrainingError EXPORT_UNSUPPORTED for files that transformers' rules do not read, and MODEL_DAMAGED.
    """

    def __init__(self, files: Sequence[Path], model: PreTrainedModel) -> None:
        self._model = model
        self._files: list[TensorFile] = []
        try:
            for path in files:
                self._files.append(TensorFile(path))
            self._file_of = {name: file for file in self._files for name in file.tensors}
            self.groups = _groups({name: file.tensors[name] for name, file in self._file_of.items()}, model)
        except BaseException:
            self.close()
            raise
        self._group_of = {name: group for group in self.groups for name in group.weights}
        self.weights = {name: each for group in self.groups for name, each in group.weights.items()}
        self._kept: tuple[Group, dict[str, torch.Tensor]] | None = None

    def close(self) -> None:
        """Ends the reading."""
        for each in self._files:
            each.close()

    def group(self, name: str) -> Group:
        """The group that a weight comes from."""
        return self._group_of[name]

    def read(self, name: str) -> torch.Tensor:
        """A weight as it is stored, in memory of its own. Weights of one group cost one reading when they are asked for
        one after the other. Raises KeyError."""
        group = self._group_of[name]
        if len(group.weights) == 1:
            return self._convert(group)[name]
        if self._kept is None or self._kept[0] is not group:
            self._kept = None
            self._kept = group, self._convert(group)
        found = self._kept[1].pop(name, None)
        if found is None:  # a second time
            self._kept = None
            found = self._convert(group)[name]
        if self._kept is not None and not self._kept[1]:
            self._kept = None
        return found

    def _convert(self, group: Group) -> dict[str, torch.Tensor]:
        tensors = {source: self._file_of[source].read(source) for _, source in group.sources}
        return _converted(group, tensors, self._model)


def on_file(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole groups of weights as the model's files call them. `model` is the one that the files were read for. Raises
    TrainingError EXPORT_UNSUPPORTED."""
    try:
        written: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    except Exception as error:
        raise unsupported(
            f"transformers cannot write {next(iter(tensors))} back as its files had it: {_line(error)}"
        ) from error
    return written


def require_loadable(model: PreTrainedModel, written: Mapping[str, Stored], expected: Mapping[str, Stored]) -> None:
    """That transformers makes of the files exactly the weights that are expected, by name and shape. Raises
    TrainingError EXPORT_UNSUPPORTED with the first difference."""
    kept = getattr(model, "_weight_conversions", None)
    try:
        found = {name: each.shape for group in _groups(written, model) for name, each in group.weights.items()}
    finally:
        _remember(model, kept)
    for name in sorted(found.keys() | expected.keys()):
        shape = expected[name].shape if name in expected else None
        if found.get(name) != shape:
            raise unsupported(f"transformers would not read {name} back as it is written")


def unsupported(what: str, hint: str = "Its adapter can be exported as it is.") -> TrainingError:
    """The error of a model that cannot be exported so."""
    return TrainingError("EXPORT_UNSUPPORTED", f"The model cannot be exported so: {what}.", hint)


def _groups(stored: Mapping[str, Stored], model: PreTrainedModel) -> list[Group]:
    """How files become weights, as `convert_and_load_state_dict_in_model` of transformers 5 does it. Tensors that no
    module has are left out, as transformers leaves them."""
    rules = get_model_conversion_mapping(model)
    renamings = [each for each in rules if isinstance(each, WeightRenaming)]
    converters = [each for each in rules if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    wanted: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, Group] = {}
    for source in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, wanted)
        if name not in wanted and source in wanted:
            name, pattern = rename_source_key(source, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if name not in wanted:
            continue
        if pattern is not None:
            group = found.setdefault(name, Group(deepcopy(by_pattern[pattern])))
        else:
            group = found.setdefault(name, Group(WeightRenaming(source, name)))
            pattern = source
        group.sources.append((pattern, source))
    _remember(model, [each for each in rules if each.was_used()])
    for name, group in found.items():
        _foretell(name, group, stored, model)
        if len(group.sources) > 1 and not isinstance(group.transform, WeightConverter):
            raise unsupported(f"several tensors of its files are called {name}")
    return list(found.values())


def _foretell(name: str, group: Group, stored: Mapping[str, Stored], model: PreTrainedModel) -> None:
    """Sets `group.weights`, by a conversion of tensors that have shapes and no numbers."""
    first = stored[group.sources[0][1]]
    if not isinstance(group.transform, WeightConverter):
        group.weights[name] = first
        return
    empty = {
        source: torch.empty(stored[source].shape, dtype=stored[source].dtype, device="meta")
        for _, source in group.sources
    }
    group.weights[name] = first  # what the converter is told to make
    made = _converted(group, empty, model)
    group.weights = {each: Stored(tensor.dtype, tuple(tensor.shape)) for each, tensor in made.items()}


def _converted(group: Group, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a group out of the tensors of the files, by name."""
    if not isinstance(group.transform, WeightConverter):
        (name,), (tensor,) = group.weights, tensors.values()
        return {name: tensor}
    name = next(iter(group.weights))
    transform = deepcopy(group.transform)
    for pattern, source in group.sources:
        transform.add_tensor(name, source, pattern, tensors[source])  # type: ignore[arg-type]
    try:
        made = transform.convert(name, model=model, config=model.config)
    except Exception as error:
        raise unsupported(f"transformers cannot make {name} of its files: {_line(error)}") from error
    return {each: value[0] if isinstance(value, list) else value for each, value in made.items()}


def _remember(model: PreTrainedModel, rules: Any) -> None:
    """Has transformers undo these rules when it writes the model's files."""
    model._weight_conversions = rules


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
