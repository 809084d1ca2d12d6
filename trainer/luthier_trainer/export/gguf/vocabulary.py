"""A tokenizer as the vocabulary of a GGUF file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from luthier_trainer.errors import TrainingError

_UNREACHED = -1e6
"""The score of pieces that no merge makes."""


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary. model: `gpt2` for byte-level BPE, `llama` for SentencePiece's. pre: how llama.cpp cuts texts into
    words before BPE. tokens, types: one of each row of the embedding. scores: of SentencePiece, which piece is made
    first. add_bos, add_eos: whether each text begins or ends so. add_space_prefix: whether a space is put before texts.
    special: token ids by llama.cpp's name. template: the chat template, empty for none.
    cutter: how the tokenizer's own definition cuts texts into words. notes: what a user should know."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    add_space_prefix: bool | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    template: str = ""
    cutter: str = ""
    notes: tuple[str, ...] = ()

    def add_to(self, writer: GGUFWriter) -> None:
        """Writes it into a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.template:
            writer.add_chat_template(self.template)

    def cut_by(self, pre: str) -> "Vocabulary":
        """The same with another way to cut texts into words."""
        return replace(self, pre=pre)

    def noted(self, notes: Iterable[str]) -> "Vocabulary":
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def spaced(self, prefix: bool) -> "Vocabulary":
        """The same with or without a space before texts."""
        return replace(self, add_space_prefix=prefix)


def definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the tokenizer computes, as the contents of a tokenizer.json. Raises TrainingError EXPORT_UNSUPPORTED for
    tokenizers that have none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise unsupported(f"a {type(tokenizer).__name__}, which is none of the library tokenizers")
    parsed: dict[str, Any] = json.loads(backend.to_str())
    return parsed


def read(tokenizer: PreTrainedTokenizerBase, rows: int, special: Mapping[str, int], template: str) -> Vocabulary:
    """The vocabulary for an embedding of so many rows, not yet cut by a known `pre`. `special`: ids by llama.cpp's
    names, of tokens that begin and end texts and turns. Raises TrainingError EXPORT_UNSUPPORTED."""
    parsed = definition(tokenizer)
    model = parsed["model"]
    if model["type"] != "BPE":
        raise unsupported(f"one of the kind {model['type']}")
    pieces = bool(model.get("byte_fallback"))
    if not pieces and not _is_byte_level(parsed):
        raise unsupported("a BPE neither of bytes nor with bytes to fall back to")
    merges = [tuple(each) if isinstance(each, list) else tuple(each.split(" ")) for each in model["merges"]]
    named = {int(token): text for text, token in model["vocab"].items()}
    added = {int(each["id"]): each for each in parsed["added_tokens"]}
    tokens, types = _tokens(named, added, rows, model.get("unk_token") if pieces else None, set(special.values()))
    if len(set(tokens)) < len(tokens):  # llama.cpp ends the process over two tokens of one name
        raise unsupported("one in which two tokens are written alike")
    add_bos, add_eos, special = _ends(tokenizer, special)
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre="default",
        tokens=tuple(tokens),
        types=tuple(types),
        add_bos=add_bos,
        add_eos=add_eos,
        merges=() if pieces else tuple(" ".join(each) for each in merges),
        scores=_scores(tokens, types, merges) if pieces else (),
        special={name: token for name, token in special.items() if token < rows},
        template=template,
        cutter=json.dumps(parsed.get("pre_tokenizer"), ensure_ascii=False),
    )


def unsupported(what: str) -> TrainingError:
    """The error of a tokenizer that llama.cpp has not."""
    return TrainingError(
        "EXPORT_UNSUPPORTED",
        f"llama.cpp cannot tokenise as this model does: its tokenizer is {what}.",
        "Export it merged for what runs transformers' models.",
    )


def _is_byte_level(parsed: Mapping[str, Any]) -> bool:
    cutter = parsed.get("pre_tokenizer") or {}
    steps = cutter.get("pretokenizers", [cutter])
    return any(each.get("type") == "ByteLevel" for each in steps)


def _tokens(
    named: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], rows: int, unknown: str | None, ends: set[int]
) -> tuple[list[str], list[int]]:
    """Text and type of each row. Rows without a token get a name that nothing makes; tokens without a row are left out,
    for the model cannot read them."""
    tokens, types = [], []
    for row in range(rows):
        text, kind = named.get(row, f"[PAD{row}]"), TokenType.NORMAL
        if row in added:
            text = added[row]["content"]
            control = bool(added[row]["special"]) or row in ends
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
        elif row not in named:
            kind = TokenType.UNUSED
        elif unknown is not None and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = TokenType.BYTE
        if unknown is not None and text == unknown:
            kind = TokenType.UNKNOWN
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """SentencePiece makes the piece with the highest score first, BPE the one whose merge stands first: the score of a
    piece is minus the place of the first merge that makes it."""
    places: dict[str, int] = {}
    for place, merge in enumerate(merges):
        places.setdefault("".join(merge), place)
    control = (TokenType.CONTROL, TokenType.BYTE, TokenType.UNKNOWN)
    return tuple(
        0.0 if kind in control else -float(places[text]) if text in places else _UNREACHED
        for text, kind in zip(tokens, types, strict=True)
    )


def _ends(tokenizer: PreTrainedTokenizerBase, special: Mapping[str, int]) -> tuple[bool, bool, dict[str, int]]:
    """(whether texts begin with a token, whether they end with one, `special` with those two in it)."""
    known = dict(special)
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            before, after = whole[:start], whole[start + len(plain) :]
            break
    else:
        raise unsupported("one that changes a text when it puts tokens around it")
    if len(before) > 1 or len(after) > 1:
        raise unsupported("one that puts several tokens around a text")
    if before:
        known["bos"] = before[0]
    if after:
        known["eos"] = after[0]
    return bool(before), bool(after), known
