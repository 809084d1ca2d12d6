"""How well a model predicts texts: perplexity a token, and bits a byte, which does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measure:
    """Of all scored tokens of some texts: their number, their mean loss (natural logarithm), and bits a byte."""

    texts: int
    tokens: int
    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def measure(model_dir: Path, texts: Iterable[str], window: int = 1024) -> Measure:
    """Each text on its own, in windows that do not overlap; the first token of a window is context alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.train(False)
    total = 0.0
    count = scored_bytes = number = 0
    for text in texts:
        number += 1
        encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
        places = encoding["offset_mapping"]
        ids = torch.tensor(encoding["input_ids"])
        for start in range(0, len(ids), window):
            block = ids[start : start + window]
            if len(block) < 2:
                continue
            with torch.inference_mode():
                loss = model(block[None], use_cache=False, labels=block[None]).loss
            total += loss.item() * (len(block) - 1)
            count += len(block) - 1
            first, last = places[start + 1][0], places[start + len(block) - 1][1]
            scored_bytes += len(text[first:last].encode())
    return Measure(number, count, total / count, total / math.log(2) / scored_bytes)
