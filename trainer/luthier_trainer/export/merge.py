"""A tuned model's weights with its adapter merged in, one tensor at a time.

W + s B A (Hu et al. 2021, arXiv 2106.09685), and with DoRA the magnitude over the norm of that (Liu et al. 2024, arXiv
2402.09353), are computed in 32 bits and rounded once. The base is what lies on disk in 16 or 32 bits, also where it was
held in 4 or 8 in training.
"""

import contextlib
from collections.abc import Iterator, Set

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from luthier_trainer.errors import TrainingError
from luthier_trainer.export.adapted import Adapted
from luthier_trainer.export.source import Tuned, weight_files
from luthier_trainer.export.stored import StoredWeights, unsupported
from luthier_trainer.export.tensor_file import Stored
from luthier_trainer.model import no_progress_bar

_WIDTHS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class MergedWeights:
    """The whole model's weights, read one at a time: what is in memory is one of them, as it is stored, in 32 bits and
    rounded.

    config: the model's, with tie_word_embeddings False where training made head and embeddings differ. names: as the
    state dict of transformers' model calls them, tied ones once.
    """

    def __init__(self, model: PreTrainedModel, stored: StoredWeights, adapted: Adapted | None) -> None:
        self._model = model
        self._stored = stored
        self._adapted = adapted
        self._origin = _origins(model, stored, adapted)
        self.config: PretrainedConfig = model.config
        self.names: tuple[str, ...] = tuple(self._origin)

    @property
    def model(self) -> PreTrainedModel:
        """The model on the meta device: modules and shapes without numbers."""
        return self._model

    @property
    def changed(self) -> frozenset[str]:
        """The weights that the adapter changes."""
        if self._adapted is None:
            return frozenset()
        return frozenset(self.names) & self._adapted.touched

    def stored(self, name: str, dtype: torch.dtype | None = None) -> Stored:
        """Kind and shape of a weight; numbers that are not whole ones in `dtype`, if that is given."""
        found = self._stored.weights[self._origin[name]]
        return Stored(dtype if dtype is not None and found.dtype.is_floating_point else found.dtype, found.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight. Raises KeyError."""
        return self._stored.weights[self._origin[name]].shape

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A weight in memory of its own: merged in 32 bits, then rounded once. Whole numbers keep their kind."""
        adapted = self._adapted
        if adapted is not None and name in adapted.replaced:
            return _fitting(adapted.replacement(name), self.shape(name), name).to(dtype)
        weight = self._stored.read(self._origin[name])
        if not weight.dtype.is_floating_point:
            return weight
        if adapted is not None and name in adapted.changes:
            weight = weight.float()
            adapted.merge(name, weight)
        return weight.to(dtype)

    def kept_wide(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The weights that transformers holds in another kind than `dtype` in a model that is loaded in `dtype`."""
        plan: dict[str, torch.dtype] = self._model._get_dtype_plan(dtype)
        if not plan:
            return {}
        pattern, by_group, _ = build_glob_alternation(list(plan))
        matches = {name: pattern.search(name) for name in self.names if self.stored(name).dtype.is_floating_point}
        return {name: plan[by_group[str(each.lastgroup)]] for name, each in matches.items() if each is not None}

    def groups(self) -> list[tuple[str, ...]]:
        """The names in the groups that are written back together (`stored.on_file`), most of them alone."""
        seen: set[str] = set()
        groups = []
        for name in self.names:
            if name in seen:
                continue
            origin = self._origin[name]
            together = [name] if origin != name else list(self._stored.group(name).weights)
            groups.append(tuple(each for each in together if each in self._origin))
            seen.update(groups[-1])
        return groups


@contextlib.contextmanager
def merged_weights(tuned: Tuned) -> Iterator[MergedWeights]:
    """The weights of a tuned model, open for reading.

    Raises TrainingError EXPORT_UNSUPPORTED for bases that are quantised on disk and for adapters that are no change of
    weights, MODEL_NOT_FOUND and MODEL_DAMAGED.
    """
    with contextlib.ExitStack() as stack:
        model = meta_model(tuned)
        stored = StoredWeights(weight_files(tuned.base), model)
        stack.callback(stored.close)
        for name, each in stored.weights.items():
            if each.dtype.is_floating_point and each.dtype not in _WIDTHS:
                raise unsupported(f"{name} of its base has {each.dtype}")
        adapted = None
        if tuned.adapter is not None:
            adapted = Adapted(tuned.adapter, meta_model(tuned))
            stack.callback(adapted.close)
        yield MergedWeights(model, stored, adapted)


def meta_model(tuned: Tuned) -> PreTrainedModel:
    """The base as the trainer loads it, without weights. Raises TrainingError EXPORT_UNSUPPORTED, MODEL_NOT_FOUND."""
    try:
        config = AutoConfig.from_pretrained(tuned.base, trust_remote_code=False, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise unsupported("the files of its base are quantised; a base in 16 or 32 bits is needed to merge into")
        with torch.device("meta"), no_progress_bar():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError("MODEL_NOT_FOUND", f"The base model cannot be read: {error}".splitlines()[0]) from error
    assert isinstance(model, PreTrainedModel)
    return model


def _origins(model: PreTrainedModel, stored: StoredWeights, adapted: Adapted | None) -> dict[str, str]:
    """Each weight of the merged model, with the weight of the files that it is made from; unties what training made
    different, in the model's configuration too."""
    there = stored.weights
    touched = adapted.touched if adapted is not None else frozenset()
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    buffers = {name for name, _ in model.named_buffers()}
    origins: dict[str, str] = {}
    apart = False
    for name in model.state_dict():
        if name in tied:
            apart = apart or _is_apart(name, tied[name], stored, touched)
            continue
        # transformers ties both ways: the files may have the head alone.
        found = [each for each in (name, *(each for each, other in tied.items() if other == name)) if each in there]
        if found:
            origins[name] = found[0]
        elif name not in buffers:  # one that is not stored is made by the model itself
            raise unsupported(f"the files of its base have no {name}")
    if apart:
        origins.update({target: target if target in there else origins[source] for target, source in tied.items()})
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    _require_touched(origins, touched)
    return origins


def _is_apart(target: str, source: str, stored: StoredWeights, touched: Set[str]) -> bool:
    """Whether two tied weights are no longer one: one of them was trained, or the files have them with different
    numbers, which transformers does not tie then."""
    if target in touched or source in touched:
        return True
    there = stored.weights
    return target in there and source in there and not torch.equal(stored.read(target), stored.read(source))


def _require_touched(origins: dict[str, str], touched: Set[str]) -> None:
    """Nothing that was trained may be lost."""
    for name in sorted(touched):
        if name not in origins:
            raise unsupported(f"its adapter changes {name}, which the model does not have")


def _fitting(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise unsupported(f"its adapter's {name} has another shape than its base's: {tuple(tensor.shape)}, {shape}")
    return tensor
