"""The chat template that conversations are rendered with: which one it is, and the text it makes of a conversation.

It is the model's own, one that Luthier brings (`templates`), or given text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from luthier.v1 import tokenization_pb2
from luthier_trainer.data.masks import sandbox, templates
from luthier_trainer.data.masks.abilities import Abilities, abilities
from luthier_trainer.data.masks.layout import Layout, learn
from luthier_trainer.data.masks.sandbox import TODAY, Span
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.records import Message
from luthier_trainer.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHATML", "RowRefused", "Span", "Template", "TextFrame", "template_of", "text_frame"]

# For a tokenizer that has ChatML's tokens and no template, as some base models do.
CHATML = templates.NAMED["chatml"].source

# Tokens that end a turn in the templates of the common model families, beside a tokenizer's own eos token.
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end|>",
    "<|return|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|role_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
)

_NOTHING = re.compile(r"(?!)")


class RowRefused(TrainingError):
    """A row that cannot be rendered or masked; others may be fine. reason: DATASET_INVALID; problem: for a finding."""

    def __init__(self, problem: Problem) -> None:
        super().__init__("DATASET_INVALID", problem.message, problem.fix)
        self.problem = problem

    def __reduce__(self) -> tuple[type["RowRefused"], tuple[Problem]]:
        return RowRefused, (self.problem,)


@dataclass(frozen=True, slots=True)
class TextFrame:
    """What stands around raw text: the start token where the tokenizer would add it by itself, and the token that ends
    a text; empty where the tokenizer has none."""

    start: str
    end: str


@dataclass(frozen=True)
class Template:
    """A chat template with all that it needs.

    source: in Jinja, empty where there is none, as raw text needs none; variables: what it may use beside the messages;
    ends: the tokens that end a turn, and turn_end, which matches one of them; control: matches any token that stands
    for itself in a text; frame: what stands around raw text; start_id and unknown_id: of the tokens that start a text
    and that stand for what the tokenizer does not know, if there are such; name: of one that Luthier brings; needs:
    the tokens that the tokenizer lacks for what else that one can write (`tools`, `images`); special: matches any token
    that only a template should write.
    """

    source: str
    variables: dict[str, Any]
    ends: tuple[str, ...]
    turn_end: re.Pattern[str]
    control: re.Pattern[str]
    frame: TextFrame
    start_id: int | None = None
    unknown_id: int | None = None
    name: str = ""
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    special: re.Pattern[str] = _NOTHING

    @cached_property
    def _compiled(self) -> sandbox.Compiled:
        return sandbox.compiled(self.source)

    @property
    def marks_turns(self) -> bool:
        """Whether it has `{% generation %}` blocks."""
        return self._compiled.marks_turns

    @cached_property
    def abilities(self) -> Abilities:
        """What it can write."""
        return abilities(self._tried)

    @cached_property
    def layout(self) -> Layout | None:
        """How it lays plain conversations out, if that is fixed."""

        def write(messages: Sequence[Message], prompt: bool) -> str | None:
            try:
                return self.render(messages, prompt=prompt)[0]
            except RowRefused:
                return None

        return learn(write)

    @cached_property
    def relatives(self) -> tuple["Template", ...]:
        """The templates that Luthier brings, with this one's variables."""
        return tuple(replace(self, source=named.source, name=name) for name, named in templates.NAMED.items())

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), prompt: bool = False
    ) -> tuple[str, list[Span] | None]:
        """The conversation's text, with the generation prompt if asked for, and the character spans of its generation
        blocks; None for these where the template has none, or does not write their text as it is.

        Raises RowRefused when the template refuses the conversation or would leave out its tools or images, and
        TrainingError TEMPLATE_MISSING, TEMPLATE_TOO_LARGE or TEMPLATE_TOO_SLOW.
        """
        if not self.source:
            raise _missing()
        self._refuse_what_is_lost(messages, tools)
        if self.abilities.parts_only:
            messages = [_in_parts(turn) for turn in messages]
        try:
            text, blocks = self._write(messages, tools, prompt)
        except TrainingError:
            raise
        except Exception as error:  # a template is foreign code and raises what it likes
            line = " ".join(str(error).split())[:300] or type(error).__name__
            message = f"The chat template refuses the conversation: {line}"
            fix = "Change the row, or take another chat template."
            raise RowRefused(Problem("TEMPLATE_REFUSES", message, fix)) from error
        return text, blocks if self.marks_turns else None

    def _write(
        self, messages: Sequence[Any], tools: Sequence[Any], prompt: bool = False
    ) -> tuple[str, list[Span] | None]:
        variables = {
            **self.variables,
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        return self._compiled.render(variables)

    def _tried(self, messages: Sequence[Any], tools: Sequence[Any]) -> str | None:
        try:
            return self._write(messages, tools)[0]
        except TrainingError:
            raise
        except Exception:  # as in `render`
            return None

    def _refuse_what_is_lost(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        calls = images = False
        for turn in messages:
            calls = calls or turn["role"] == "tool" or bool(turn.get("tool_calls"))
            content = turn["content"]
            images = images or (not isinstance(content, str) and any(part["type"] == "image" for part in content))
        if tools and not self.abilities.tools:
            raise _lost("TOOLS_NOT_SUPPORTED", "the tools")
        if calls and not self.abilities.calls:
            raise _lost("TOOLS_NOT_SUPPORTED", "tool calls or their results")
        if images and not self.abilities.images:
            raise _lost("IMAGES_NOT_SUPPORTED", "images")
        for feature, used in (("tools", bool(tools) or calls), ("images", images)):
            if used and feature in self.needs:
                tokens = ", ".join(self.needs[feature])
                message = (
                    f"The chat template {self.name} writes {feature} with tokens that the tokenizer lacks: {tokens}."
                )
                fix = _IMAGES_FIX if feature == "images" else "Use the model's own template."
                raise RowRefused(Problem(f"{feature.upper()}_NOT_SUPPORTED", message, fix))


_IMAGES_FIX = "Leave the images out of the rows: training on images is not offered yet."


def _lost(code: str, what: str) -> RowRefused:
    message = f"The chat template has no place for {what} of this row, so the model would never see them."
    if what == "images":
        return RowRefused(Problem(code, message, _IMAGES_FIX))
    fix = f"Take a chat template that writes {what} (qwen does), or take them out of the rows."
    return RowRefused(Problem(code, message, fix))


def _in_parts(turn: Message) -> Message:
    content = turn["content"]
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def template_of(
    tokenizer: "PreTrainedTokenizerBase", tokenization: tokenization_pb2.Tokenization | None = None
) -> Template:
    """The template that conversations are rendered with: the one that `tokenization` names or gives; else the
    tokenizer's own, or CHATML for one that has none but knows ChatML's tokens, or none at all: it can be used for raw
    text, and raises TEMPLATE_MISSING for a conversation.

    Raises TrainingError: TEMPLATE_MISSING where it is not known which of several is meant; TEMPLATE_UNKNOWN for a name
    that is none; TEMPLATE_MISMATCH for a named one whose tokens the tokenizer does not know; TEMPLATE_INVALID,
    TEMPLATE_TOO_LARGE or TEMPLATE_TOO_SLOW for one that does not compile; TOKENIZER_UNSUPPORTED for a tokenizer that
    cannot tell where its tokens lie in a text.
    """
    _require_offsets(tokenizer)
    added = tokenizer.get_added_vocab()
    name = tokenization.chat_template_name if tokenization is not None else ""
    needs: dict[str, tuple[str, ...]] = {}
    if name:
        source, needs = _named(name, added)
    elif tokenization is not None and tokenization.chat_template:
        source = tokenization.chat_template
    elif tokenizer.chat_template:
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:
            raise _missing(f"its tokenizer has several chat templates and none is the default: {error}") from error
    elif {"<|im_start|>", "<|im_end|>"} <= added.keys():
        source = CHATML
    else:
        source = ""
    eos = tokenizer.eos_token
    ends = tuple(dict.fromkeys(token for token in (eos, *_TURN_ENDS) if isinstance(token, str) and token in added))
    variables = {**tokenizer.special_tokens_map, "date_string": TODAY.strftime("%d %b %Y")}
    start, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    if unknown in (start, tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = None  # it has a meaning of its own, as GPT-2's has
    frame = text_frame(tokenizer)
    sandbox.compiled(source)
    # Not tags of thoughts and calls, or runs of spaces: those are for anybody to write.
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return Template(
        source,
        variables,
        ends,
        _any_of(ends),
        _any_of(added),
        frame,
        start,
        unknown,
        name,
        needs,
        _any_of(token for token in {*special, *ends} if token.strip()),
    )


def _missing(why: str = "its tokenizer has no chat template") -> TrainingError:
    return TrainingError(
        "TEMPLATE_MISSING",
        f"It is not known how a conversation looks to the model: {why}.",
        "Name or give a chat template, or take the model's instruction-tuned variant.",
    )


def text_frame(tokenizer: "PreTrainedTokenizerBase") -> TextFrame:
    """What stands around raw text. Raises TrainingError TOKENIZER_UNSUPPORTED as `template_of`."""
    _require_offsets(tokenizer)
    start = tokenizer.bos_token
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    end = tokenizer.eos_token
    return TextFrame(start if isinstance(start, str) and adds else "", end if isinstance(end, str) else "")


def _require_offsets(tokenizer: "PreTrainedTokenizerBase") -> None:
    if not tokenizer.is_fast:
        raise TrainingError(
            "TOKENIZER_UNSUPPORTED",
            "The model's tokenizer has no tokenizer.json, so it cannot tell which tokens belong to a turn.",
            "Convert it: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY) with a fast tokenizer class.",
        )


def _named(name: str, added: Mapping[str, int]) -> tuple[str, dict[str, tuple[str, ...]]]:
    """A template's source, and the tokens that the tokenizer lacks for what it can write beyond text."""
    named = templates.NAMED.get(name)
    if named is None:
        known = ", ".join(templates.NAMED)
        raise TrainingError("TEMPLATE_UNKNOWN", f"There is no chat template {name!r}. There is: {known}.")
    lacking = [token for token in named.tokens if token not in added]
    if lacking:
        raise TrainingError(
            "TEMPLATE_MISMATCH",
            f"The chat template {name} uses tokens that the model's tokenizer does not know: {', '.join(lacking)}.",
            "Take the model's own chat template, or the one of its family.",
        )
    needs = {
        feature: tuple(token for token in tokens if token not in added)
        for feature, tokens in (("tools", named.tool_tokens), ("images", named.image_tokens))
    }
    return named.source, {feature: tokens for feature, tokens in needs.items() if tokens}


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(tokens), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in longest_first)) if longest_first else _NOTHING
