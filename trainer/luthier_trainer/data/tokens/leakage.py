"""Rows that are in both of two datasets: an evaluation on them measures memory."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.tokens.parts import Part
from luthier_trainer.data.tokens.tokenised import TokenisedRows

Hashes = npt.NDArray[np.uint64]


def leakage(training: Part[TokenisedRows], validation: Part[TokenisedRows]) -> Iterator[tuple[int, Problem]]:
    """Yields (line of the validation rows, what it shares with a training row), in the order of the file.

    Rows are compared by the 64-bit hash of their rendered text, and those that differ by that of the text before the
    first trained token; 0 stands for none. A million rows take about a second.
    """
    held, kept = validation.indices, training.indices
    whole = _first_equal(validation.rows.text_hashes[held], training.rows.text_hashes[kept])
    prompt = _first_equal(validation.rows.prompt_hashes[held], training.rows.prompt_hashes[kept])
    its_lines, lines = validation.rows.lines[held], training.rows.lines[kept]
    for index in np.flatnonzero((whole >= 0) | (prompt >= 0)).tolist():
        line = int(its_lines[index])
        if whole[index] >= 0:
            other = int(lines[whole[index]])
            message = f"Validation line {line} is training line {other} too."
            yield line, Problem("LEAKAGE", message, "Take the row out of one of the two datasets.", Level.WARNING)
        else:
            other = int(lines[prompt[index]])
            message = f"Validation line {line} has the same prompt as training line {other}, with another answer."
            yield line, Problem("SAME_PROMPT_LEAKAGE", message, level=Level.NOTE)


def _first_equal(wanted: Hashes, among: Hashes) -> npt.NDArray[np.int64]:
    """For each hash the index of the first equal one among others, -1 for none and for a hash of 0."""
    if not len(among):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(among, kind="stable")
    ordered = among[order]
    ascending = np.argsort(wanted)  # what is looked up in order is near in memory
    at = np.empty(len(wanted), np.int64)
    at[ascending] = np.searchsorted(ordered, wanted[ascending])
    at = np.minimum(at, len(ordered) - 1)
    found = (ordered[at] == wanted) & (wanted != 0)
    return np.where(found, order[at], -1)
