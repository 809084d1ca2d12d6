"""Texts that tokenizers get wrong when they are rewritten in another form, and conversations that templates may."""

# ruff: noqa: RUF001 (characters that look like others are the point)

import unicodedata
from typing import Any

from luthier_trainer.data.records import Message, Passage, ToolCall

HARD_TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\tif x:\r\n\t\t\treturn\r\n",
    " leading and trailing ",
    "two  spaces   three    four",
    "1234567890 3.14159 1,000,000 12345 2024-07-26",
    "don't we'll THEY'RE it's I'M o'clock",
    "CamelCase snake_case SCREAMING_CASE kebab-case x86_64",
    "def f(a, *, b=None) -> dict[str, int]:\n    return {'a': [1, 2]}  # done\n",
    '{"name": "Ada", "tags": ["a", "b"], "n": -1.5e-3, "none": null}',
    "https://example.org/a/b?c=d&e=%20f#g",
    "Grüße aus Zürich, où est l'été? ¿Qué? Ñandú, İstanbul, ß",
    "e\u0301 n\u0303 \u0915\u094d\u0937",
    "\u00e9 \u00f1 \ufb01 \u03a9",
    "\u2126 \u212b",
    "Привет, мир! Съешь ещё этих мягких французских булок.",
    "你好，世界！日本語のテキスト、カタカナ。한국어 문장입니다.",
    "مرحبا بالعالم שלום עולם",
    "हिन्दी में पाठ ไทย ខ្មែរ",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪 🌈",
    "❤️ ☎️ 🏳️‍🌈",
    "a\u00a0b\u2009c\u200bd\u3000e\ufefff",
    "\u0000\u0001\u007f",
    "…—–“quoted”‘single’ ½ ² ™ €100 £5 ∑∫√",
    "!!!??? ... ,,, ;;; ((())) [[[]]] {{{}}} <<<>>> ### *** ~~~ ```",
    "=" * 40 + "\n" + "-" * 33 + "\n" + " " * 17 + "x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|end_of_text|>",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<eos>",
    "<s>[INST] Hi [/INST] Hello</s>",
    "<|endoftext|><|im_end |>< |im_end|><|IM_END|><unk><pad><0x0A>",
    "<think>\n\n</think>\n\nSo <tool_call>{}</tool_call>",
)
"""Empty and blank texts, runs of spaces, lines and tabs, digits, contractions, code, accents composed and not, other
scripts, emoji of several code points, odd spaces, control characters, and what looks like special tokens."""

_ASKS: Message = {"role": "user", "content": " What time is it? "}
_RULE: Message = {"role": "system", "content": "Be brief.\n"}
_SAYS: Message = {"role": "assistant", "content": "<think>\nLook.\n</think>\n\nIt is noon."}
_CALL: ToolCall = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "clock", "arguments": {"zone": "Europe/Zurich"}},
}
_CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: Message = {"role": "tool", "name": "clock", "tool_call_id": "call12345", "content": "12:00"}
_CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}

HARD_CONVERSATIONS = {
    "a question": Passage(messages=[_ASKS], to_answer=True),
    "a question after a system turn": Passage(messages=[_RULE, _ASKS], to_answer=True),
    "a second question": Passage(messages=[_ASKS, _SAYS, _ASKS], to_answer=True),
    "a conversation with a system turn": Passage(messages=[_RULE, _ASKS, _SAYS, _ASKS, _SAYS]),
    "a question with a tool": Passage(messages=[_ASKS], tools=(_CLOCK,), to_answer=True),
    "a tool's result": Passage(messages=[_RULE, _ASKS, _CALLS, _RESULT], tools=(_CLOCK,), to_answer=True),
}
"""What the rows may have none of: system turns, several turns, reasoning, tools, calls and their results."""


def has_variants(text: str) -> bool:
    """Whether Unicode writes the text in another way too: letters and their marks (NFC), signs that stand for letters;
    or whether it has marks at all."""
    marked = any(unicodedata.category(each).startswith("M") for each in text)
    return marked or unicodedata.normalize("NFC", text) != text
