"""Checks of an export against the tuned model.

Rounding may choose another of two tokens that the tuned model holds for nearly as likely, and a greedy answer then goes
another way. An export is blamed for such a choice only where the tuned model sets its own choice apart from the
export's by more than the limit of a difference: a nearer one counts as the same, and an answer is compared up to there.

An export need not write an answer to be compared: it reads the tuned model's. It would write the same if and only if
its own likeliest token is, at each place of it, the one that is there.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from luthier.v1.export_proof_pb2 import ProofCheck
from luthier_trainer.data.records import Passage
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.proof.artefact import Artefact, Floats
from luthier_trainer.export.proof.measure import Continuation, Judged, Standing, agreement, differences
from luthier_trainer.export.proof.reference import Reference
from luthier_trainer.export.proof.rows import ProofRow
from luthier_trainer.export.proof.texts import HARD_CONVERSATIONS, HARD_TEXTS
from luthier_trainer.export.proof.thresholds import Limits

_SHOWN = 60

_MOST_BY_CHANCE = 1
"""So many other tokens are no proof against quantised weights: of few predictions one is a large share."""


def tokenization(reference: Reference, artefact: Artefact) -> ProofCheck:
    """TOKENIZATION: the tokens of the rows, of their prompts, and of texts that are hard."""
    total = equal = 0
    message = ""
    for name, text, special, expected in _texts(reference, artefact):
        found = artefact.tokenise(text, special=special)
        total += 1
        equal += found == expected
        if found != expected and not message:
            message = f"{name}: {_first_token(reference, expected, found)}"
    texts = total
    for name, token in artefact.special.items():
        own = reference.special[name]
        total += 1
        equal += token == own
        if token != own and not message:
            message = f"the {name} is {_said(reference, own)}, in the export {_said(reference, token)}"
    return _share("TOKENIZATION", equal, total, message or f"{texts} texts have the same tokens")


def template(reference: Reference, artefact: Artefact) -> ProofCheck:
    """TEMPLATE: the conversations as the export's own template writes them, whole and up to the answer."""
    chats = [row for row in reference.rows if row.passage.messages is not None]
    if not chats:
        return _share("TEMPLATE", 0, 0, "the rows are raw text, which needs no template")
    try:
        own = artefact.template(reference.template)
    except TrainingError as error:
        return _share("TEMPLATE", 0, len(chats), error.message)
    total, equal, message = 0, 0, ""
    for name, passages in _conversations(reference, chats):
        try:
            different = [
                _first_character(expected, own.render(each.messages or [], tools=each.tools, prompt=each.to_answer)[0])
                for each, expected in passages
            ]
        except TrainingError as error:
            different = [error.message]
        said = next(filter(None, different), "")
        total, equal = total + 1, equal + (not said)
        if said and not message:
            message = f"{name}: {said}"
    return _share("TEMPLATE", equal, total, message or f"{total} conversations are written the same")


def _conversations(reference: Reference, chats: Sequence[ProofRow]) -> Iterator[tuple[str, list[tuple[Passage, str]]]]:
    """(what it is, passages and what the tuned model's template makes of each): the rows, and what they may lack."""
    for row in chats:
        yield f"line {row.line}", [(row.passage, row.text), (row.prompt, row.prompt_text)]
    for name, passage in HARD_CONVERSATIONS.items():
        with contextlib.suppress(TrainingError):  # one that the model was not made for
            turns = passage.messages or []
            yield name, [(passage, reference.template.render(turns, tools=passage.tools, prompt=passage.to_answer)[0])]


def stop_tokens(reference: Reference, artefact: Artefact) -> ProofCheck:
    """STOP_TOKENS: whether generation stops at every token that the rows teach to end a turn with, and at no word of
    theirs."""
    taught = sorted(reference.taught)
    predicted = {token for row in reference.rows for token in row.targets}
    words = [
        each
        for each in sorted((artefact.ends - reference.ends) & predicted)
        if not reference.template.control.fullmatch(reference.name_of(each))
    ]
    if words:
        message = f"the export stops at {reference.name_of(words[0])!r} ({words[0]}), with which no answer ends"
        return _share("STOP_TOKENS", len(taught), len(taught) + len(words), message)
    lost = [each for each in taught if each not in artefact.ends]
    names = ", ".join(map(reference.name_of, taught))
    if lost:
        ends = ", ".join(map(reference.name_of, sorted(artefact.ends))) or "nothing"
        message = f"training ends turns with {reference.name_of(lost[0])} ({lost[0]}), and the export stops at {ends}"
    else:
        message = f"it stops at {names}" if names else "the rows teach no token to stop at"
    return _share("STOP_TOKENS", len(taught) - len(lost), len(taught), message)


def numbers(
    reference: Reference, found: Sequence[Judged], answers: Sequence[Judged], ends: frozenset[int], limits: Limits
) -> list[ProofCheck]:
    """TOP1_AGREEMENT, LOGPROB_DIFFERENCE, PERPLEXITY_RATIO and GREEDY_TEXT, as far as the type is judged by them.
    found, answers: what the export thinks of the rows and of the tuned model's answers; ends: at which it stops."""
    checks = [_top1(reference, found, limits)]
    if limits.logprob is not None:
        checks.append(_logprob(reference, found, limits.logprob))
    checks.append(_perplexity(reference, found, limits.perplexity))
    if limits.answers:
        checks.append(_greedy(reference, answers, ends, limits))
    return checks


def _top1(reference: Reference, found: Sequence[Judged], limits: Limits) -> ProofCheck:
    total = equal = near = 0
    message = ""
    for row, own, judged in zip(reference.rows, reference.standings, found, strict=True):
        same, tied = agreement(own, judged, _tie(own, limits))
        total, equal, near = total + len(same), equal + int(same.sum()), near + int(tied.sum())
        other = np.flatnonzero(~(same | tied))
        if len(other) and not message:
            place = int(other[0])
            expected, token = int(own.ids[place, 0]), int(judged.best[place])
            message = (
                f"first at line {row.line}, position {row.positions[place]}: {reference.name_of(expected)!r} "
                f"({expected}) is the likeliest token, and in the export {reference.name_of(token)!r} ({token})"
            )
    limit = limits.top1 if limits.answers else min(limits.top1, 1 - _MOST_BY_CHANCE / total)
    agree = f"{equal} of {total} likeliest tokens are the same" + f", {near} nearly tied" * (near > 0)
    value = (equal + near) / total
    return ProofCheck(
        name="TOP1_AGREEMENT",
        passed=value >= limit,
        value=value,
        limit=limit,
        message=agree + f"; {message}" * bool(message),
    )


def _tie(own: Standing, limits: Limits) -> Floats:
    """In nats, of each position."""
    return limits.tie * (own.spread if limits.tie_by_spread else np.ones_like(own.spread))


def _logprob(reference: Reference, found: Sequence[Judged], limit: float) -> ProofCheck:
    largest, where, sums, count = -1.0, "", 0.0, 0
    for row, own, judged in zip(reference.rows, reference.standings, found, strict=True):
        every = differences(own, judged)
        sums, count = sums + float(every[:, 0].sum()), count + len(every)
        place, column = np.unravel_index(int(every.argmax()), every.shape)
        if every[place, column] > largest:
            largest = float(every[place, column])
            of_target = column == 0
            token = row.targets[place] if of_target else int(own.ids[place, column - 1])
            expected = own.target[place] if of_target else own.logprobs[place, column - 1]
            other = judged.target[place] if of_target else judged.at[place, column - 1]
            where = (
                f"at line {row.line}, position {row.positions[place]}, token {reference.name_of(token)!r} ({token}): "
                f"{expected:.6g} and in the export {other:.6g}"
            )
    return ProofCheck(
        name="LOGPROB_DIFFERENCE",
        passed=largest <= limit,
        value=largest,
        limit=limit,
        message=f"largest {largest:.3g} nats, mean {sums / count:.3g}; largest {where}",
        is_ceiling=True,
    )


def _perplexity(reference: Reference, found: Sequence[Judged], limit: float) -> ProofCheck:
    own = -float(np.concatenate([each.target for each in reference.standings]).mean(dtype=np.float64))
    other = -float(np.concatenate([each.target for each in found]).mean(dtype=np.float64))
    ratio = math.exp(min(abs(other - own), 700.0)) if math.isfinite(other) else math.inf
    message = f"perplexity {_exp(own):.6g}, of the export {_exp(other):.6g}"
    return ProofCheck(
        name="PERPLEXITY_RATIO", passed=ratio <= limit, value=ratio, limit=limit, message=message, is_ceiling=True
    )


def _greedy(reference: Reference, found: Sequence[Judged], ends: frozenset[int], limits: Limits) -> ProofCheck:
    equal, message = 0, ""
    for row, expected, judged in zip(reference.rows, reference.continuations, found, strict=True):
        said = _other_answer(reference, expected, judged, ends, limits)
        equal += not said
        if said and not message:
            message = f"line {row.line}: {said}"
    return _share("GREEDY_TEXT", equal, len(reference.rows), message or f"{equal} answers are the same")


def _other_answer(
    reference: Reference, expected: Continuation, judged: Judged, ends: frozenset[int], limits: Limits
) -> str:
    """How an answer differs; empty where it does not, or goes another way at a tie."""
    same, tied = agreement(expected.standing, judged, _tie(expected.standing, limits))
    for place, own in enumerate(expected.ids):
        if tied[place]:
            return ""
        if not same[place]:
            other = int(judged.best[place])
            return (
                f"token {place} of the answer is {reference.name_of(own)!r} ({own}), "
                f"in the export {reference.name_of(other)!r} ({other})"
            )
        if own in ends and place + 1 < len(expected.ids):
            return f"the export stops at {reference.name_of(own)!r}, where the tuned model goes on"
    if expected.stopped and expected.ids[-1] not in ends:
        return f"the export goes on after {reference.name_of(expected.ids[-1])!r}, where the tuned model stops"
    return ""


def _texts(reference: Reference, artefact: Artefact) -> Iterator[tuple[str, str, bool, list[int]]]:
    """(what it is, the text, whether with what the tokenizer adds, its tokens)."""
    for row in reference.rows:
        yield f"line {row.line}", row.text, False, list(row.whole_ids)
        yield f"the prompt of line {row.line}", row.prompt_text, False, list(row.whole_prompt_ids)
    for text, (plain, special) in zip(HARD_TEXTS, reference.hard, strict=True):
        if not artefact.knows(text):
            continue
        yield f"the text {text[:_SHOWN]!r}", text, False, plain
        yield f"the text {text[:_SHOWN]!r} with what the tokenizer adds", text, True, special


def _said(reference: Reference, token: int | None) -> str:
    return "none" if token is None else f"{reference.name_of(token)!r} ({token})"


def _first_token(reference: Reference, expected: Sequence[int], found: Sequence[int]) -> str:
    for place, (own, other) in enumerate(zip(expected, found, strict=False)):
        if own != other:
            return f"token {place} is {reference.name_of(own)!r} ({own}), in the export {other}"
    return f"{len(expected)} tokens, in the export {len(found)}"


def _first_character(expected: str, found: str) -> str:
    """Where two texts part; empty where they do not."""
    if expected == found:
        return ""
    pairs = zip(expected, found, strict=False)
    place = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    return (
        f"from character {place} the template writes {expected[place:][:_SHOWN]!r}, "
        f"in the export {found[place:][:_SHOWN]!r}"
    )


def _share(name: str, equal: int, total: int, message: str) -> ProofCheck:
    """A check that asks for all of them; where there is nothing to compare it holds."""
    value = equal / total if total else 1.0
    return ProofCheck(name=name, passed=equal == total, value=value, limit=1.0, message=message)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
