"""A passage as a model sees it, for people: its text, its tokens, and what becomes of each."""

from collections.abc import Iterator

import numpy as np

from luthier.v1 import datasets_pb2
from luthier_trainer.data.masks.render import Example, problems, tokenise
from luthier_trainer.data.masks.spans import render
from luthier_trainer.data.masks.template import RowRefused
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.records import Passage
from luthier_trainer.data.tokens.overlong import cut
from luthier_trainer.data.tokens.report import too_long
from luthier_trainer.data.tokens.task import Tokens

_MOST_TOKENS = 8192


def see(passage: Passage, tokens: Tokens, sequence: datasets_pb2.PreviewSequence) -> tuple[str, str, list[Problem]]:
    """Fills in the tokens of `sequence`, at most 8,192, and their counts. Returns (its text, how it is known which
    tokens are trained, what was found); the text is empty when the template refuses the passage, which is found then.

    Raises TrainingError as `render` what the passage cannot be blamed for."""
    try:
        rendered = render(passage, tokens.template, tokens.options.masking)
    except RowRefused as refusal:
        return "", "", [refusal.problem]
    (example,) = tokenise([rendered], tokens.tokenizer)
    options = tokens.options
    count = len(example.input_ids)
    ranges = cut(count, options.overlong, options.max_length)
    lost = np.ones(count, np.bool_)
    trained = np.zeros(count, np.bool_)
    for start, end in ranges:
        if not passage.to_answer and not example.trained[start + 1 : end].any():
            continue  # nothing of it is trained, so it is left out
        lost[start:end] = False
        trained[start + 1 : end] = example.trained[start + 1 : end]  # nothing predicts the first
    sequence.token_count = count
    sequence.trained_count = int(np.count_nonzero(trained))
    texts = _texts(rendered.text, example)
    for token, text, is_trained, is_lost in zip(
        example.input_ids[:_MOST_TOKENS].tolist(), texts, trained.tolist(), lost.tolist(), strict=False
    ):
        sequence.tokens.add(id=token, text=text, trained=is_trained, lost=is_lost)
    found = list(problems(rendered, example, tokens.template))
    if count > options.max_length:
        kept = sum(not lost[start] for start, _ in ranges)
        found.append(too_long(count, options.max_length, options.overlong, kept, int(np.count_nonzero(lost))))
    return rendered.text, rendered.method, found


def _texts(text: str, example: Example) -> Iterator[str]:
    """What each token covers: the bytes of one character share its place, and the first has it."""
    before = (-1, -1)
    for start, end in example.offsets[:_MOST_TOKENS].tolist():
        yield "" if (start, end) == before else text[start:end].encode("utf-8", "replace").decode()
        before = (start, end)
