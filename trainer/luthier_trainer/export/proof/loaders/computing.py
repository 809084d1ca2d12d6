"""A model of transformers, as the proof asks it."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from luthier_trainer.data.masks.template import Template, template_of
from luthier_trainer.export.proof.artefact import Floats, NotLoaded


class Computing:
    """A causal model in evaluation mode. `wrapper`: what is called, the model itself or PEFT's around it."""

    def __init__(self, model: PreTrainedModel, wrapper: nn.Module | None = None) -> None:
        self._called = wrapper or model
        self._called.train(False)
        self._device = model.device
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> Floats:
        """[positions, vocabulary], computed at these positions alone where the model can."""
        wanted = torch.tensor(list(positions), device=self._device)
        given = {"logits_to_keep": wanted} if self._keeps else {}
        found = self._called(input_ids=self._tensor(ids), use_cache=False, **given).logits[0]
        return _floats(found if self._keeps else found[wanted])

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self._device)


def _floats(logits: torch.Tensor) -> Floats:
    found: Floats = logits.float().cpu().numpy()
    return found if np.isfinite(found).all() else np.nan_to_num(found, nan=-1e30, posinf=1e30, neginf=-1e30)


class Words:
    """The tokenizer and the chat template in a directory."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises its errors as Exception itself
            raise NotLoaded(f"its tokenizer: {first_line(error)}") from error

    @property
    def eos(self) -> frozenset[int]:
        """What the tokenizer calls the end; empty for none."""
        found = self._tokenizer.eos_token_id
        return frozenset() if found is None else frozenset({int(found)})

    @property
    def special(self) -> Mapping[str, int | None]:
        """As `Artefact.special`."""
        return special_tokens(self._tokenizer)

    def tokenise(self, text: str, *, special: bool) -> list[int]:
        """As `Artefact.tokenise`."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def template(self, like: Template) -> Template:
        """As `Artefact.template`: with no other template in its place where the files have none."""
        found = template_of(self._tokenizer)
        if self._tokenizer.chat_template or not like.source:
            return found
        return Template("", found.variables, found.ends, found.turn_end, found.control, found.frame)


class TorchArtefact(Computing):
    """An export that transformers computes."""

    def __init__(
        self, model: PreTrainedModel, words: Words, ends: frozenset[int], wrapper: nn.Module | None = None
    ) -> None:
        super().__init__(model, wrapper)
        self._words = words
        self._ends = ends

    @property
    def ends(self) -> frozenset[int]:
        """The tokens at which its `generate` stops."""
        return self._ends

    @property
    def special(self) -> Mapping[str, int | None]:
        """As `Artefact.special`."""
        return self._words.special

    def tokenise(self, text: str, *, special: bool) -> list[int]:
        """As `Artefact.tokenise`."""
        return self._words.tokenise(text, special=special)

    def knows(self, text: str) -> bool:
        """Every text: the tokenizer is the same program."""
        return True

    def template(self, like: Template) -> Template:
        """As `Artefact.template`."""
        return self._words.template(like)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int | None]:
    """The tokens that programs ask a tokenizer for, by its names of them."""
    return {name: getattr(tokenizer, f"{name}_id", None) for name in ("bos_token", "eos_token", "pad_token")}


def generation_ends(model: PreTrainedModel) -> frozenset[int]:
    """The tokens at which `generate` stops when nothing else is said."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return frozenset(int(each) for each in (own if isinstance(own, list) else [own]) if each is not None)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
