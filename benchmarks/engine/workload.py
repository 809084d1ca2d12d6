"""The pinned work: a random 28M-parameter Llama and 600 chats of log-normal length.

Both are functions of a seed. The weights are random because only speed is measured; every word is one token, so that
lengths are exact.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HIDDEN = 512
LAYERS = 8
HEADS = 8
INTERMEDIATE = 1280
VOCABULARY = 8192
MAX_LENGTH = 1024
RANK = 16
CHATS = 600
SEED = 20_251_121

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>", "user", "assistant")
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MEDIAN_TOKENS = 180
_SIGMA = 0.8
_SHORTEST = 24
_GROUP = 8
END_OF_TURN = _SPECIAL.index("<|im_end|>")
_TURN_TOKENS = 3  # <|im_start|>, the role, <|im_end|>; newlines are not tokens


@dataclass(frozen=True)
class Chat:
    """One row. tokens: of the whole chat; scored: those of the assistant's turns with the token that ends them."""

    messages: tuple[tuple[str, str], ...]
    tokens: int
    scored: int


def chats() -> list[Chat]:
    """All rows: exchanges of a user and an assistant, 55 to 75 % of the words the assistant's."""
    draw = random.Random(SEED)
    return [_chat(draw) for _ in range(CHATS)]


def sample(count: int) -> list[Chat]:
    """`count` of the rows in random order, for a pass that takes seconds and pads like one over all of them.

    Groups of 8 that are neighbours in the order by length, from the middle of equal strata. A few rows drawn at random
    would differ so much in length that grouping them (TRL's `group_by_length`) pads 20 % where it pads 5 % over 600.
    """
    ordered = sorted(chats(), key=lambda chat: chat.tokens)
    groups = -(-count // _GROUP)
    chosen: list[Chat] = []
    for index in range(groups):
        middle = int(len(ordered) * (index + 0.5) / groups)
        start = min(max(middle - _GROUP // 2, 0), len(ordered) - _GROUP)
        chosen += ordered[start : start + _GROUP]
    random.Random(SEED).shuffle(chosen)
    return chosen[:count]


def _chat(draw: random.Random) -> Chat:
    return chat(draw, log_normal(draw, _MEDIAN_TOKENS, MAX_LENGTH), VOCABULARY)


def log_normal(draw: random.Random, median: int, most: int) -> int:
    """A length around the median, at least 24 tokens and at most `most`."""
    return min(max(round(draw.lognormvariate(0, _SIGMA) * median), _SHORTEST), most)


def chat(draw: random.Random, length: int, vocabulary: int) -> Chat:
    """A chat of `length` tokens from a vocabulary of so many words."""
    exchanges = min(draw.choice((1, 1, 2, 3)), max(1, length // 40))
    words = length - 2 * exchanges * _TURN_TOKENS
    answered = max(exchanges, round(words * draw.uniform(0.55, 0.75)))
    asked = words - answered
    messages: list[tuple[str, str]] = []
    for index in range(exchanges):
        messages.append(("user", _text(draw, _part(asked, exchanges, index), vocabulary)))
        messages.append(("assistant", _text(draw, _part(answered, exchanges, index), vocabulary)))
    return Chat(tuple(messages), length, answered + exchanges)


def _part(total: int, parts: int, index: int) -> int:
    return total * (index + 1) // parts - total * index // parts


def _text(draw: random.Random, words: int, vocabulary: int) -> str:
    return " ".join(f"w{draw.randrange(vocabulary - len(_SPECIAL))}" for _ in range(words))


def write_rows(path: Path, rows: Iterable[Chat]) -> None:
    """JSONL in the messages format."""
    lines = (
        json.dumps({"messages": [{"role": role, "content": text} for role, text in each.messages]}) for each in rows
    )
    path.write_text("\n".join(lines) + "\n")


def write_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """The tokenizer of a vocabulary of so many words."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, *(f"w{number}" for number in range(vocabulary - len(_SPECIAL)))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in _SPECIAL[:4]])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|unk|>"
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)


def write_model(folder: Path) -> None:
    """The model and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TURN,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
