"""Greedy answers of the tuned model."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from luthier_trainer.export.proof.measure import MOST_NEW_TOKENS
from luthier_trainer.stop import Check

_AT_ONCE = 16


class _Checked(StoppingCriteria):
    """Asks between two tokens whether somebody wants the trainer gone."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._check()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], ends: frozenset[int], check: Check
) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to MOST_NEW_TOKENS and with the one that ended them. Raises what
    `check` raises."""
    pad = min(ends, default=0)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=MOST_NEW_TOKENS,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    model.train(False)
    own, model.generation_config = model.generation_config, config  # a base may ask for penalties, which fill gaps
    try:
        return _written(model, prompts, config, ends, check)
    finally:
        model.generation_config = own


def _written(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    ends: frozenset[int],
    check: Check,
) -> list[list[int]]:
    pad = config.pad_token_id
    answers = []
    for start in range(0, len(prompts), _AT_ONCE):
        part = prompts[start : start + _AT_ONCE]
        longest = max(map(len, part))
        ids = torch.tensor([[pad] * (longest - len(each)) + list(each) for each in part], device=model.device)
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in part], device=model.device)
        with torch.no_grad():
            written = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=[_Checked(check)]
            )
        answers += [_ended(each, ends) for each in written[:, longest:].tolist()]
    return answers


def _ended(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Up to the first token that ends an answer: what follows is padding."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: end + 1]
