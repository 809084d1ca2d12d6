"""Held-out rows as the tuned model was trained to see them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from luthier.trainer.v1.task_pb2 import DatasetSource
from luthier_trainer.data.formats import records
from luthier_trainer.data.masks.masking import Masking
from luthier_trainer.data.masks.render import render, tokenise
from luthier_trainer.data.masks.template import RowRefused, Template
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.reading import Reading
from luthier_trainer.data.records import Passage, Record, passages
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.proof.measure import MOST_NEW_TOKENS
from luthier_trainer.stop import Check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 512
"""Of a row are scored at most: later tokens see the same weights."""

MOST_SCORED = 128
"""Of these at most are compared, the first that were trained: each costs a row of logits as wide as the vocabulary."""


@dataclass(frozen=True)
class ProofRow:
    """A row of the proof. line: its place in the file; passage, prompt: the whole of it and up to where the model
    answers, of a conversation as messages; text, prompt_text: the same rendered; whole_ids, whole_prompt_ids: their
    tokens; ids: of the text, cut to what the model takes; positions: ascending, those whose following token is
    compared; prompt_ids: what is to be continued, never empty; taught: the tokens that its trained turns end with."""

    line: int
    passage: Passage
    prompt: Passage
    text: str
    prompt_text: str
    whole_ids: tuple[int, ...]
    whole_prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    positions: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    taught: frozenset[int]

    @property
    def targets(self) -> list[int]:
        """The tokens that follow the positions."""
        return [self.ids[position + 1] for position in self.positions]


def read_rows(
    source: DatasetSource,
    count: int,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    masking: Masking,
    *,
    longest: int,
    check: Check,
) -> tuple[ProofRow, ...]:
    """The first `count` rows that have something to compare, as training would read, render and tokenise them; fewer
    where the file has no more. `longest`: tokens that the model takes.

    Raises TrainingError PROOF_IMPOSSIBLE when there is none, and as `render`; OSError when the file cannot be read.
    """
    found: list[ProofRow] = []
    with records(Path(source.path), Reading.from_proto(source.reading)) as file:
        for line, record, _ in file:
            check()
            for passage in () if isinstance(record, Problem) else _passages(record):
                row = _row(line, passage, tokenizer, template, masking, min(longest, MOST_TOKENS))
                if row is not None:
                    found.append(row)
            if len(found) >= count:
                break
    if not found:
        raise TrainingError(
            "PROOF_IMPOSSIBLE",
            f"The dataset {source.name or source.id} has no row to compare the export on.",
            "Name another with proof_dataset: one whose rows the model's chat template takes.",
        )
    return tuple(found[:count])


def _passages(record: Record) -> Iterator[Passage]:
    """What of a record is compared: of two answers the one that is wanted."""
    for passage in passages(record):
        if passage.name not in ("rejected", "undesired"):
            yield passage


def _row(
    line: int,
    passage: Passage,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    masking: Masking,
    longest: int,
) -> ProofRow | None:
    """The row; None for one that the template refuses, or of less than two tokens."""
    prompt = _prompt(passage)
    try:
        rendered = render(passage, template, masking)
        prompt_text = render(prompt, template).text if prompt.messages is not None else template.frame.start
    except RowRefused:
        return None
    if prompt.messages is None:
        prompt_text += (prompt.text or "").removeprefix(template.frame.start)
    whole, asked = tokenise([rendered, replace(rendered, text=prompt_text, spans=())], tokenizer)
    whole_ids, whole_prompt_ids = tuple(whole.input_ids.tolist()), tuple(asked.input_ids.tolist())
    ids = whole_ids[:longest]
    scored = np.flatnonzero(whole.trained[1 : len(ids)])
    positions = scored if len(scored) else np.arange(len(ids) - 1)
    prompt_ids = whole_prompt_ids[-max(longest - MOST_NEW_TOKENS, 1) :]
    if len(ids) < 2 or not prompt_ids:
        return None
    return ProofRow(
        line=line,
        passage=passage,
        prompt=prompt,
        text=rendered.text,
        prompt_text=prompt_text,
        whole_ids=whole_ids,
        whole_prompt_ids=whole_prompt_ids,
        ids=ids,
        positions=tuple(positions[:MOST_SCORED].tolist()),
        prompt_ids=prompt_ids,
        taught=_taught(rendered.text, rendered.spans, tokenizer, template),
    )


def _prompt(passage: Passage) -> Passage:
    """Up to where the model answers: the turns before the last answer; of raw text its first half."""
    if passage.messages is None:
        text = passage.text or ""
        return replace(passage, text=text[: (len(text) + 1) // 2])
    turns = passage.messages
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    return replace(passage, messages=turns[:last] or turns, to_answer=True)


def _taught(
    text: str, spans: tuple[tuple[int, int], ...], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> frozenset[int]:
    """The tokens that end a turn and are trained at the end of one."""
    known = tokenizer.get_added_vocab()
    found = set()
    for start, end in spans:
        said = text[start:end].rstrip()
        found |= {known[each] for each in template.ends if said.endswith(each) and each in known}
    return frozenset(found)
