"""That llama.cpp makes the same tokens of texts as the tokenizer that the model was trained with.

A vocabulary does not say all: llama.cpp cuts texts into words by rules of its own, of which a file names one. The rule
is found by trial, and what is found is proven by the same trial: hard texts, a sample of the vocabulary itself and
every added token must come out as the same tokens.
"""

import json
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PreTrainedTokenizerBase

from luthier_trainer.export.gguf import library
from luthier_trainer.export.gguf.vocabulary import Vocabulary, unsupported
from luthier_trainer.stop import Check

_RULES = {
    "gpt-2": "",
    "smollm": '"Digits"',
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    "qwen35": r"[\p{L}\p{M}]+|\p{N}|",
    "tekken": r"\p{Lt}",
    "gpt-4o": r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|",
    "deepseek-r1-qwen": "",
    "deepseek-v3": "",
    "deepseek-llm": "",
    "deepseek-coder": "",
    "falcon3": "",
    "starcoder": "",
}
"""llama.cpp's names of ways to cut texts into words, and what the definition of a tokenizer that cuts so has in it.
Such a rule is tried first, because several may give the same tokens with a small vocabulary."""
_INEXACT = {"tekken"}
"""Rules that llama.cpp has only nearly: its expression for words takes no notice of marks, such as the vowels of
Devanagari, that follow a letter."""
_SAMPLE = 1000
_ADDED = 500
_WIDTH = 32

HARD_TEXTS: tuple[str, ...] = tuple(json.loads((Path(__file__).parent / "hard_texts.json").read_bytes()))


def proven(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, check: Check) -> Vocabulary:
    """The vocabulary with the rule by which llama.cpp makes the tokenizer's tokens of every text that is tried. Where
    llama.cpp has a rule only nearly, texts with combining marks may differ, and a note says so.

    Raises TrainingError EXPORT_UNSUPPORTED with the first text that differs under the rule that comes nearest.
    """
    texts = _texts(vocabulary, tokenizer)
    wanted = [list(tokenizer(text)["input_ids"]) for text in texts]
    nearest: tuple[int, str] | None = None
    for candidate in _candidates(vocabulary):
        check()
        found = _tokenized(candidate, texts)
        if isinstance(found, str):
            nearest = nearest or (-1, found)
            continue
        differing = [i for i, tokens in enumerate(found) if tokens != wanted[i]]
        told = [_difference(texts[i], wanted[i], found[i], vocabulary) for i in differing[:1]]
        if all(candidate.pre in _INEXACT and _has_marks(texts[i]) for i in differing):
            return candidate.noted(f"llama.cpp cuts words with combining marks otherwise: {each}." for each in told)
        if nearest is None or len(texts) - len(differing) > nearest[0]:
            nearest = len(texts) - len(differing), told[0]
    raise unsupported(f"one whose words llama.cpp cuts otherwise: {nearest[1] if nearest else 'no rule is known'}")


def _candidates(vocabulary: Vocabulary) -> Sequence[Vocabulary]:
    if vocabulary.model == "llama":
        return [vocabulary.spaced(True), vocabulary.spaced(False)]
    signs = {rule: json.dumps(sign)[1:-1] if "\\" in sign else sign for rule, sign in _RULES.items()}
    likely = sorted(_RULES, key=lambda rule: not (signs[rule] and signs[rule] in vocabulary.cutter))
    return [vocabulary.cut_by(rule) for rule in likely]


def _has_marks(text: str) -> bool:
    return any(unicodedata.category(each).startswith("M") for each in text)


def _texts(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Hard texts; those tokens of the vocabulary that are whole characters, some of them; added tokens, alone and
    between words."""
    texts = list(HARD_TEXTS)
    added = {token: text for text, token in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])}
    step = max(len(vocabulary.tokens) // _SAMPLE, 1)
    for token in range(0, len(vocabulary.tokens), step):
        text = tokenizer.decode([token])
        # llama.cpp normalises no Unicode, and some tokenizers compose letters before they look at their vocabulary
        if token not in added and isinstance(text, str) and unicodedata.is_normalized("NFC", text):
            texts += [text] if text and "\ufffd" not in text else []
    within = [text for token, text in added.items() if token < len(vocabulary.tokens)]
    texts += within[:_ADDED]
    texts += [f"one{text}two" for text in within[:_ADDED]]
    texts += [f"{text}\none {text} two\n" for text in within[:_ADDED]]
    return texts


def _tokenized(vocabulary: Vocabulary, texts: Sequence[str]) -> list[list[int]] | str:
    """What llama.cpp makes of texts; or what it says when it does not take the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        _write_without_weights(path, vocabulary)
        try:
            with library.opened(path) as read:
                return [read.tokenize(text) for text in texts]
        except ValueError as error:
            return str(error)


def _write_without_weights(path: Path, vocabulary: Vocabulary) -> None:
    """A file that llama.cpp loads: the vocabulary, and one narrow layer of zeros that take no room on the disk."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(_WIDTH)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary.add_to(writer)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd.weight": (len(vocabulary.tokens), _WIDTH)}
    shapes |= {f"blk.0.{name}.weight": (_WIDTH, _WIDTH) for name in matrices}
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * shape[0] * shape[1]
        writer.add_tensor_info(name, shape, np.dtype(np.float16), nbytes, GGMLQuantizationType.F16)
        size += GGUFWriter.ggml_pad(nbytes, writer.data_alignment)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"):
        writer.add_tensor_info(name, (_WIDTH,), np.dtype(np.float32), 4 * _WIDTH, GGMLQuantizationType.F32)
        size += GGUFWriter.ggml_pad(4 * _WIDTH, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.truncate(GGUFWriter.ggml_pad(file.tell(), writer.data_alignment) + size)


def _difference(text: str, wanted: list[int], found: list[int], vocabulary: Vocabulary) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found))
    )

    def said(tokens: list[int]) -> str:
        if place >= len(tokens):
            return "nothing"
        token = tokens[place]
        return f"{token} ({vocabulary.tokens[token]!r})" if token < len(vocabulary.tokens) else str(token)

    shown = text if len(text) <= 60 else text[:57] + "..."
    return f"of {shown!r} it makes {said(found)} where the tokenizer makes {said(wanted)}"
