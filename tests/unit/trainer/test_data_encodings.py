"""Odd characters: what is found where, and that no language is taken for a mistake."""

# ruff: noqa: RUF001 (characters that are easily confused are what this is about)

import pytest

from luthier_trainer.data.doctor.duplicates import content
from luthier_trainer.data.doctor.encodings import may_be_odd, odd_encoding
from luthier_trainer.data.problem import Level
from luthier_trainer.data.records import Chat, Record, Text


def found(record: Record) -> list[str]:
    """The findings of a row, as the check finds them: with the cheap look first."""
    prompt, rest = content(record)
    return [problem.message for problem in odd_encoding(record)] if may_be_odd((prompt or b"") + rest) else []


def misread(text: str) -> str:
    """UTF-8 read as Windows-1252, as browsers do: the five bytes it does not have stay."""
    return "".join(
        bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte)
        for byte in text.encode()
    )


@pytest.mark.parametrize(
    "text",
    ["café", "naïve", "£5", "it’s", "“so”", "– yes", "20 °C", "ñandú", "😀", "Привет", "weiß", "Ölüm", "Ça", "ÉCOLE"],
)
def test_text_that_was_read_with_the_wrong_encoding_is_found(text: str) -> None:
    (message,) = found(Text(f"They said {misread(text)} to me."))
    assert "wrong encoding" in message


@pytest.mark.parametrize(
    "text",
    [
        "Le café est à côté; « MAÇÃ » e NÃO. Ângela, château, Âme",
        "Þórður, eð, Ðð, smørrebrød, Ångström, naïveté — “quoted” it’s 20 °C, £5, ½",
        "Привет, мир! Ещё раз. ЪЫЬЭЮЯ",
        "今日は、世界！ＡＢＣ　全角。你好，世界：「引号」",
        "안녕하세요 세계",
        "مرحبا بالعالم \u200f(نعم)\u200e",
        "नमस्ते दुनिया, สวัสดีชาวโลก",
        "😀👩‍👩‍👧❤️🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f🇩🇪",
        "tab\there\r\nnew line\f\nnew page",
        r"\begin{array} \frac{1}{2} \\frac \\begin",
        "∑∫√ ≤ ≥ → ⟨x⟩ 𝒙 ²",
        'C:\\users\\u0041 and a literal "\\u00e9"',
    ],
)
def test_no_language_and_no_sign_is_odd(text: str) -> None:
    assert list(odd_encoding(Text(text))) == []


@pytest.mark.parametrize(
    ("character", "what"),
    [
        ("\ufffd", "replacement characters"),
        ("\x00", "control characters"),
        ("\x08", "control characters"),
        ("\x0b", "control characters"),
        ("\x1b", "control characters"),
        ("\x7f", "control characters"),
        ("\x85", "control characters"),
        ("\ue000", "private-use"),
        ("\uf8ff", "private-use"),
        ("\U000f0000", "private-use"),
        ("\U0010fffd", "private-use"),
        ("\ufeff", "byte order marks"),
        ("\ufffe", "noncharacters"),
        ("\u202e", "invisible"),
        ("\U000e0041", "invisible"),
    ],
)
def test_characters_that_no_one_types_are_found(character: str, what: str) -> None:
    for text in (f"a{character}b", f"{character}", f"今{character}"):
        (message,) = found(Text(text))
        assert what in message
        assert message.isprintable()


@pytest.mark.parametrize("text", ["\begin{array}", "so \frac{1}{2}", "a\\\begin"])
def test_latex_whose_backslashes_were_not_escaped_is_found(text: str) -> None:
    (message,) = found(Text(text))
    assert "backslash is not escaped" in message


def test_each_kind_is_named_once_with_its_first_place() -> None:
    chat = Chat([{"role": "user", "content": "a\ufffdb"}, {"role": "assistant", "content": "c\ufffdd\x07"}])
    (problem,) = odd_encoding(chat)
    assert (problem.code, problem.level) == ("ODD_ENCODING", Level.WARNING)
    assert problem.message == (
        "The row holds replacement characters (U+FFFD), where something could not be decoded (turn 1, user); "
        "control characters (turn 2, assistant)."
    )


def test_the_cheap_look_lets_nothing_through_that_is_odd() -> None:
    for code in (
        *range(0x20),
        0x7F,
        *range(0x80, 0xA0),
        0x202E,
        0xE123,
        0xF800,
        0xFEFF,
        0xFFFD,
        0xE0020,
        0xE007F,
        0x100000,
    ):
        text = f"word {chr(code)} word"
        assert bool(list(odd_encoding(Text(text)))) <= may_be_odd(content(Text(text))[1]), hex(code)
