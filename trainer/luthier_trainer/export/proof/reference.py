"""What the tuned model itself says, computed as training computed it and from nothing that an export wrote."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.trainer.v1.task_pb2 import BaseModelSource, DatasetSource
from luthier.v1 import tokenization_pb2
from luthier_trainer.config import LoraSettings
from luthier_trainer.data.masks.masking import Masking
from luthier_trainer.data.masks.template import Template, template_of
from luthier_trainer.export.proof.greedy import greedy
from luthier_trainer.export.proof.loaders.computing import Computing, generation_ends, special_tokens
from luthier_trainer.export.proof.measure import MOST_NEW_TOKENS, Continuation, Judged, Standing, judged, standing
from luthier_trainer.export.proof.noise import shake
from luthier_trainer.export.proof.rows import MOST_TOKENS, ProofRow, read_rows
from luthier_trainer.export.proof.texts import HARD_TEXTS
from luthier_trainer.export.source import Tuned
from luthier_trainer.model import load_base, load_config, load_tokenizer, prepare
from luthier_trainer.stop import Check

_CONTINUED = LoraSettings(rank=0, alpha=0.0, dropout=0.0, target_modules=(), modules_to_save=())
"""Says that there is an adapter; what kind is in its own files."""


@dataclass(frozen=True)
class Reference:
    """The tuned model's answers.

    standings, continuations: of each row, of its scored positions and to its prompt; shaken: what it thinks of the same
    positions with noise on its weights, where that was asked for; hard: the tokens of HARD_TEXTS, without and with what
    the tokenizer adds; special: the tokens that the tokenizer names for a purpose; ends: at which its answers end;
    longest: tokens that it takes; name_of: a token's text, for people.
    """

    rows: tuple[ProofRow, ...]
    standings: tuple[Standing, ...]
    shaken: tuple[Judged, ...]
    continuations: tuple[Continuation, ...]
    hard: tuple[tuple[list[int], list[int]], ...]
    special: Mapping[str, int | None]
    template: Template
    ends: frozenset[int]
    longest: int
    vocabulary: int
    name_of: Callable[[int], str]

    @property
    def by_row(self) -> tuple[tuple[ProofRow, ...], tuple[Standing, ...], tuple[Continuation, ...]]:
        """What there is of each row."""
        return self.rows, self.standings, self.continuations

    @property
    def taught(self) -> frozenset[int]:
        """The tokens that trained turns of the rows end with."""
        return frozenset().union(*(row.taught for row in self.rows))

    @property
    def tokens(self) -> int:
        """Predictions that are compared."""
        return sum(len(row.positions) for row in self.rows)


def ask(
    tuned: Tuned,
    dataset: DatasetSource,
    count: int,
    tokenization: tokenization_pb2.Tokenization,
    noise: float,
    progress: Callable[[], None],
    check: Check,
) -> Reference:
    """Asks the tuned model about the first `count` usable rows, in 32 bits. Nothing of it is in memory afterwards.

    `noise`: on its weights, the second time that it is asked, by the root mean square of each weight's row; 0 for no
    second time. `progress` is called after each row. Raises TrainingError as `read_rows` and the trainer's own loading,
    and what `check` raises.
    """
    words = BaseModelSource(location=str(tuned.base), adapter_dir=str(tuned.directory))
    tokenizer = load_tokenizer(words)
    template = template_of(tokenizer)
    limit = getattr(load_config(words).get_text_config(), "max_position_embeddings", None)  # type: ignore[attr-defined]
    longest = min(limit or MOST_TOKENS, MOST_TOKENS + MOST_NEW_TOKENS)
    masking = Masking.from_proto(tokenization)
    rows = read_rows(dataset, count, tokenizer, template, masking, longest=longest, check=check)
    base = load_base(BaseModelSource(location=str(tuned.base)), torch.float32, torch.device("cpu"), "auto")
    if tuned.adapter is None:
        model = Computing(base)
    else:
        source = BaseModelSource(location=str(tuned.base), adapter_dir=str(tuned.adapter))
        trained = prepare(base, source, _CONTINUED, name="", seed=0, resume_from=None)
        model = Computing(trained.causal_lm, trained.root)
    eos = tokenizer.eos_token_id
    ends = generation_ends(base) | (frozenset() if eos is None else {int(eos)})
    ends |= frozenset().union(*(row.taught for row in rows))
    answers = greedy(base, [row.prompt_ids for row in rows], ends, check)
    standings, continuations = [], []
    for row, answer in zip(rows, answers, strict=True):
        check()
        standings.append(standing(model.logits(row.ids[:-1], row.positions), row.targets))
        continuations.append(_thought(model, row.prompt_ids, answer, ends))
        progress()
    shaken = []
    if noise:
        shake(base, noise)
        for row, own in zip(rows, standings, strict=True):
            check()
            shaken.append(judged(model.logits(row.ids[:-1], row.positions), row.targets, own))
    _let_go(base)
    hard = [
        (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"],
        )
        for text in HARD_TEXTS
    ]
    return Reference(
        rows=rows,
        standings=tuple(standings),
        shaken=tuple(shaken),
        continuations=tuple(continuations),
        hard=tuple(hard),
        special=special_tokens(tokenizer),
        template=template,
        ends=ends,
        longest=longest,
        vocabulary=base.config.get_text_config().vocab_size,
        name_of=lambda token: _name(tokenizer, token),
    )


def _thought(model: Computing, prompt: Sequence[int], answer: Sequence[int], ends: frozenset[int]) -> Continuation:
    """What the model thinks of its own answer, read in one piece. Answers are written side by side, padded, and with a
    cache, whose rounding may choose another of two equal tokens: an answer ends before the first that is not the
    likeliest."""
    ids = [*prompt, *answer]
    found = standing(model.logits(ids[:-1], range(len(prompt) - 1, len(ids) - 1)), answer)
    differ = np.flatnonzero(found.ids[:, 0] != np.array(answer))
    kept = int(differ[0]) if len(differ) else len(answer)
    return Continuation(tuple(answer[:kept]), kept == len(answer) and answer[-1] in ends, found.upto(kept))


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token for people: its text, or where that is part of a character, what the vocabulary calls it."""
    text = str(tokenizer.decode([token]))
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token))


def _let_go(model: PreTrainedModel) -> None:
    """Gives the memory of the weights back: a model that PEFT wraps is a cycle, and may live on for a while."""
    for each in (*model.parameters(), *model.buffers()):
        each.data = each.data.new_empty(0)
