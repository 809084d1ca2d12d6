"""Small numbers out of logits: what is kept of a model once it is gone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from luthier_trainer.export.proof.artefact import Floats, Ints

CANDIDATES = 64
"""How many of the likeliest tokens are kept at each position: one of them may be nearly tied with the first."""

COMPARED = 8
"""Of how many of these the log-probabilities are compared."""

MOST_NEW_TOKENS = 32
"""Length of a greedy answer."""


@dataclass(frozen=True)
class Standing:
    """What a model thinks at positions. target: float32 [n], the log-probability of the token that follows;
    ids, logprobs: [n, CANDIDATES], the likeliest tokens, best first; spread: float32 [n], the standard deviation of the
    logits over the vocabulary, the scale on which errors of the weights show."""

    target: Floats
    ids: Ints
    logprobs: Floats
    spread: Floats

    def upto(self, count: int) -> "Standing":
        """The first positions."""
        return Standing(self.target[:count], self.ids[:count], self.logprobs[:count], self.spread[:count])

    @staticmethod
    def joined(parts: Sequence["Standing"]) -> "Standing":
        """All positions of several texts."""
        return Standing(
            np.concatenate([each.target for each in parts]),
            np.concatenate([each.ids for each in parts]),
            np.concatenate([each.logprobs for each in parts]),
            np.concatenate([each.spread for each in parts]),
        )


@dataclass(frozen=True)
class Judged:
    """What another model thinks at the same positions. target: as above; best: int32 [n], its likeliest token; at:
    float32 [n, CANDIDATES], its log-probabilities of the first model's likeliest."""

    target: Floats
    best: Ints
    at: Floats

    @staticmethod
    def joined(parts: Sequence["Judged"]) -> "Judged":
        """All positions of several texts."""
        return Judged(
            np.concatenate([each.target for each in parts]),
            np.concatenate([each.best for each in parts]),
            np.concatenate([each.at for each in parts]),
        )


@dataclass(frozen=True)
class Continuation:
    """A greedy answer. ids: its tokens, with the one that ended it; stopped: whether one did; standing: what the model
    thought at each, whose targets are the tokens themselves."""

    ids: tuple[int, ...]
    stopped: bool
    standing: Standing


def log_softmax(logits: Floats) -> Floats:
    """Of one row, computed in 64 bits."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    return wide.astype(np.float32)


def standing(logits: Sequence[Floats] | Floats, targets: Sequence[int]) -> Standing:
    """What the logits [n, vocabulary] say, and of the tokens that follow."""
    count = len(targets)
    target, spread = np.zeros(count, np.float32), np.zeros(count, np.float32)
    ids, kept = np.zeros((count, CANDIDATES), np.int32), np.zeros((count, CANDIDATES), np.float32)
    for row, (each, token) in enumerate(zip(logits, targets, strict=True)):
        found = log_softmax(each)
        best = _best(found)
        target[row], spread[row] = found[token], each.std(dtype=np.float64)
        ids[row], kept[row] = best, found[best]
    return Standing(target, ids, kept, spread)


def judged(logits: Floats, targets: Sequence[int], reference: Standing) -> Judged:
    """What the logits [n, vocabulary] say of the same. A token beyond the vocabulary has a log-probability of minus
    infinity."""
    count = len(targets)
    target, best = np.zeros(count, np.float32), np.zeros(count, np.int32)
    at = np.zeros((count, CANDIDATES), np.float32)
    for row, (each, token) in enumerate(zip(logits, targets, strict=True)):
        found = log_softmax(each)
        target[row], best[row] = _of(found, np.array([token]))[0], found.argmax()
        at[row] = _of(found, reference.ids[row])
    return Judged(target, best, at)


def differences(own: Standing, other: Judged) -> npt.NDArray[np.float64]:
    """[n, 1 + COMPARED]: how far the log-probabilities of the token that follows, and of the likeliest, are apart."""
    targets = np.abs(other.target.astype(np.float64) - own.target)
    likeliest = np.abs(other.at[:, :COMPARED].astype(np.float64) - own.logprobs[:, :COMPARED])
    return np.concatenate([targets[:, None], likeliest], axis=1)


def agreement(own: Standing, other: Judged, tie: Floats) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(where the likeliest token is the same, where it is another that `own` sets apart from its own by no more than
    `tie` [n], in nats). A token that is not among CANDIDATES is never tied."""
    same = other.best == own.ids[:, 0]
    is_it = own.ids == other.best[:, None]
    apart = own.logprobs[:, 0] - np.where(is_it, own.logprobs, -np.inf).max(axis=1)
    return same, ~same & (apart <= tie)


def _best(logprobs: Floats) -> Ints:
    """The likeliest tokens, best first; of equal ones the lower id."""
    count = min(CANDIDATES, len(logprobs))
    some = np.argpartition(-logprobs, count - 1)[:count]
    ordered = some[np.lexsort((some, -logprobs[some]))]
    return np.resize(ordered, CANDIDATES).astype(np.int32)  # a tiny vocabulary has fewer


def _of(logprobs: Floats, ids: Ints) -> Floats:
    known = (ids >= 0) & (ids < len(logprobs))
    return np.where(known, logprobs[np.where(known, ids, 0)], -np.inf).astype(np.float32)
