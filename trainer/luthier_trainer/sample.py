"""Answers to the sample prompts, by greedy decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from luthier.v1 import event_pb2
from luthier_trainer.forward import set_attention
from luthier_trainer.stop import Check

_PROMPTS_AT_ONCE = 64


class _Checked(StoppingCriteria):
    """Asks between two tokens whether somebody wants the trainer gone."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._check()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    attention: str,
    check: Check,
) -> list[event_pb2.Sample]:
    """The model's answers, in order. `prompt_ids` are the rendered prompts; `attention` names an implementation that
    knows a cache and padding, and the model has its own back afterwards. Raises StopRequested."""
    own = model.config._attn_implementation
    ends = _end_tokens(model, tokenizer)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=ends or None,
        pad_token_id=_pad_token(tokenizer, ends),
        use_cache=True,
    )
    samples: list[event_pb2.Sample] = []
    model.train(False)
    set_attention(model, attention)
    try:
        for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
            part = slice(start, start + _PROMPTS_AT_ONCE)
            ids, mask = _left_padded(prompt_ids[part], config.pad_token_id, model.device)
            with torch.no_grad():
                output = model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=[_Checked(check)]
                )
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            samples += [
                event_pb2.Sample(prompt=prompt, completion=text)
                for prompt, text in zip(prompts[part], texts, strict=True)
            ]
    finally:
        set_attention(model, own)
        model.train()
    return samples


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, by the tokenizer or by the model's own generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(each for each in found if each is not None)


def _pad_token(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return ends[0] if ends else 0


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(each) for each in prompts)
    ids = torch.tensor([[pad] * (longest - len(each)) + list(each) for each in prompts])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    return ids.to(device), mask.to(device)
