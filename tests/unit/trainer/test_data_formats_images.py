"""Images by every habit become parts in order; what did not come with the rows is an error, and nothing is fetched."""

import base64
from pathlib import Path
from typing import Any

import pytest

from luthier_trainer.data.formats import convert, detect
from luthier_trainer.data.formats.images import MAX_IMAGE_BYTES, missing
from luthier_trainer.data.problem import Problem
from luthier_trainer.data.records import Chat, Preference, images

PNG = base64.b64encode(
    (Path(__file__).parents[2] / "samples" / "datasets" / "images" / "pictures" / "red.png").read_bytes()
).decode()
URL = f"data:image/png;base64,{PNG}"
ANSWER = {"role": "assistant", "content": "Red."}


def picture(name: str) -> dict[str, str]:
    return {"type": "image", "image": name}


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def row(content: object, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ANSWER], **more}


def content_of(value: dict[str, Any]) -> object:
    found = detect(value)
    assert found is not None
    record = convert(value, found)
    assert isinstance(record, Chat), record
    return record.messages[0]["content"]


def problem_of(value: dict[str, Any]) -> Problem:
    found = detect(value)
    assert found is not None
    record = convert(value, found)
    assert isinstance(record, Problem), record
    return record


def test_placeholders_become_the_images_of_the_row_in_order() -> None:
    value = row("<image>First <image>, then <image>", images=["a.png", "b.png", "a.png"])
    expected = [picture("a.png"), words("First "), picture("b.png"), words(", then "), picture("a.png")]
    assert content_of(value) == expected


def test_placeholders_go_on_over_turns_parts_and_formats() -> None:
    turns = [
        {"from": "human", "value": "<image>One?"},
        {"from": "gpt", "value": "Yes."},
        {"from": "human", "value": "And <image>"},
        {"from": "gpt", "value": "No."},
    ]
    record = convert({"conversations": turns, "images": ["a.png", "b.png"]}, detect({"conversations": turns}))  # type: ignore[arg-type]
    assert isinstance(record, Chat)
    assert images(record.messages) == ["a.png", "b.png"]
    mixed = row([{"type": "image"}, words("and <image>")], images=["a.png", "b.png"])
    assert content_of(mixed) == [picture("a.png"), words("and "), picture("b.png")]
    assert content_of({"instruction": "<image>", "input": "What?", "output": "Red.", "images": "a.png"}) == [
        picture("a.png"),
        words("\n\nWhat?"),
    ]


@pytest.mark.parametrize(
    "part",
    [
        picture("a.png"),
        {"type": "image", "path": "a.png", "image": None},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}},
    ],
)
def test_a_part_names_its_image_in_any_wrapping(part: dict[str, Any]) -> None:
    assert content_of(row([part, words("What?")])) == [picture("a.png"), words("What?")]


def test_bytes_of_a_table_become_a_data_url_by_what_they_are() -> None:
    value = row("<image>What?", images=[{"bytes": PNG, "path": "wrong.jpg"}])
    assert content_of(value) == [picture(URL), words("What?")]
    assert content_of(row([picture(URL.replace("png", "jpeg"))])) == [picture(URL)]


def test_the_word_for_a_placeholder_is_text_where_a_row_has_no_images() -> None:
    assert content_of(row("Write <image> for a picture.")) == "Write <image> for a picture."


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (row("What?", images=["a.png"]), "IMAGE_COUNT"),
        (row("<image><image>", images=["a.png"]), "IMAGE_COUNT"),
        (row([{"type": "image"}, words("What?")]), "IMAGE_COUNT"),
        (row([picture("http://localhost/a.png")]), "IMAGE_NOT_INCLUDED"),
        (row("<image>", images=["HTTPS://example.org/a.png"]), "IMAGE_NOT_INCLUDED"),
        (row([picture("data:image/svg+xml;base64,PHN2Zy8+")]), "BAD_IMAGE"),
        (row([picture("data:text/html;base64,PGI+")]), "BAD_IMAGE"),
        (row([picture("data:image/png,xyz")]), "BAD_IMAGE"),
        (row([picture("data:image/png;base64,!!!!")]), "BAD_IMAGE"),
        (row([picture("data:image/png;base64,é")]), "BAD_IMAGE"),
        (row([picture("data:image/png;base64,")]), "BAD_IMAGE"),
        (row([picture("a\0.png")]), "BAD_IMAGE"),
        (row([picture("a" * 5000)]), "BAD_IMAGE"),
        (row([picture("data:image/png;base64," + "A" * (MAX_IMAGE_BYTES * 3 // 2))]), "BAD_IMAGE"),
        (row("<image>", images=[3]), "BAD_IMAGE"),
        (row("<image>", images=[{"bytes": None, "path": None}]), "BAD_IMAGE"),
        (
            {"messages": [{"role": "user", "content": "?"}, {**ANSWER, "content": [picture("a.png")]}]},
            "NOT_SUPPORTED",
        ),
        ({"messages": [{"role": "user", "content": "a.png", "images": ["a.png"]}, ANSWER]}, "NOT_SUPPORTED"),
        ({"text": "<image>", "images": ["a.png"]}, "NOT_SUPPORTED"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(value: dict[str, Any], code: str) -> None:
    assert problem_of(value).code == code


def test_an_image_that_did_not_come_along_is_missing_and_a_data_url_is_not() -> None:
    found = convert(row([picture("a.png"), picture(URL)]), detect(row("")))  # type: ignore[arg-type]
    assert isinstance(found, Chat)
    assert missing(found, {"a.png"}.__contains__) is None
    problem = missing(found, lambda name: False)
    assert problem is not None
    assert problem.code == "IMAGE_MISSING"
    assert "luthier dataset upload rows.json --images DIR" in problem.fix


def test_images_of_a_preference_stand_in_its_prompt() -> None:
    value = {"prompt": "<image>What?", "chosen": "Red.", "rejected": "Blue.", "images": ["a.png"], "system": "s"}
    found = detect(value)
    assert found is not None
    record = convert(value, found)
    assert isinstance(record, Preference), record
    assert record.prompt[1]["content"] == [picture("a.png"), words("What?")]
    assert (record.chosen, record.rejected) == ([ANSWER], [{**ANSWER, "content": "Blue."}])
    assert missing(record, lambda name: False) is not None
