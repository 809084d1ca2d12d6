"""What the proof asks of an export that is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from luthier_trainer.data.masks.template import Template

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class Computes(Protocol):
    """A model that computes."""

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> Floats:
        """[positions, vocabulary]: of what follows each of these positions of a text, which ascend."""


class Artefact(Computes, Protocol):
    """An export as what will load it sees it; nothing of it is the tuned model's."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens at which generation stops, by the export's own files."""

    @property
    def special(self) -> Mapping[str, int | None]:
        """The tokens that the export's tokenizer names for a purpose, as far as the form tells them apart."""

    def tokenise(self, text: str, *, special: bool) -> list[int]:
        """The text's tokens; with `special` also those that the tokenizer adds by itself."""

    def knows(self, text: str) -> bool:
        """Whether its tokens can be asked to be the same. What no export of this form could hold is judged in rows, but
        not in texts that were made to be hard."""

    def template(self, like: Template) -> Template:
        """The chat template in the export's files, to be rendered as `like` is. Raises TrainingError as
        `template_of`."""


@dataclass(frozen=True)
class Loader:
    """What loaded an export. name: as in `luthier.v1.ExportProof`."""

    name: str
    version: str


class NotLoaded(Exception):
    """The export cannot be loaded by what it is made for, or cannot compute."""
