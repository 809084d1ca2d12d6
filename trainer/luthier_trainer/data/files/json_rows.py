"""Rows of JSONL, a line at a time, and of a JSON array, an element at a time; neither takes more memory than its
longest row.

Values are as orjson reads them: of equal keys the last one counts, whole numbers past 64 bits become floating point,
and numbers that are none (`NaN`, `1e999`) as well as lone surrogates are refused.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

import orjson

from luthier_trainer.data.files.json_problems import not_an_object, not_json, not_utf8
from luthier_trainer.data.files.row import Row, Unreadable, mebibytes
from luthier_trainer.data.problem import Problem

_CHUNK = 1024 * 1024
_BLANK_LINES = 1000
_SPACE = re.compile(r"[ \t\r\n]*")
_SPREAD = "The object that begins here is spread over several lines. Write each object on one line."


def json_lines(file: BinaryIO, head: bytes, max_line: int) -> Iterator[Row]:
    """The rows of JSONL; blank lines are none. head: what the file begins with. Ends after the first row where the
    objects are spread over lines."""
    number = 0
    blank = 0
    seen = False
    while line := file.readline(max_line + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8) or b"\n"
        if len(line) > max_line:
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK)
            yield Row(number, too_long("line", max_line))
            seen = True
        elif line.isspace():
            blank += 1
            if blank % _BLANK_LINES == 0:
                number += skipped_blank_lines(file)
        else:
            value = json_object(line)
            if not seen and isinstance(value, Problem) and _is_spread(head):
                fix = "Write each object on one line: jq -c . FILE > NEW_FILE.jsonl"
                yield Row(number, Problem("NOT_JSON", _SPREAD, fix))
                return
            yield Row(number, value)
            seen = True


def json_elements(file: BinaryIO, max_element: int, max_array: int) -> Iterator[Row]:
    """The elements of an array. Ends after the first one whose end cannot be found.

    Raises Unreadable when the array is longer than max_array bytes.
    """
    text = _Text(file, max_array)
    if not text.begins_with("["):
        message = "A JSON file is one array of objects; this one does not begin with a bracket."
        yield Row(0, Problem("NOT_JSON", message, "Name the file format jsonl where there is one object a line."))
        return
    text.position += 1
    number = 0
    if text.begins_with("]"):
        text.position += 1
        yield from _after_the_array(text)
        return
    while True:
        number += 1
        text.skip_space()
        found = _element(text, max_element)
        if found is not None:
            yield Row(number, found)
            return
        yield Row(number, json_object(text.text[text.start : text.position]))
        if text.begins_with("]"):
            text.position += 1
            yield from _after_the_array(text)
            return
        if not text.begins_with(","):
            yield Row(number, text.problem(text.position, "expected a comma or the end of the array"))
            return
        text.position += 1


def skipped_blank_lines(file: BinaryIO) -> int:
    """Skips blank lines without looking at each, and returns how many: a file of little else would take minutes."""
    count = 0
    while isinstance(file, io.BufferedReader) and (ahead := file.peek()):
        blank = ahead.rfind(b"\n", 0, len(ahead) - len(ahead.lstrip())) + 1
        if not blank:
            break
        count += ahead.count(b"\n", 0, blank)
        file.read(blank)
    return count


def too_long(what: str, limit: int) -> Problem:
    """What is wrong with a row over the limit."""
    return Problem("LINE_TOO_LONG", f"The {what} is longer than {mebibytes(limit)}. Split the row.")


class _Text:
    """A window on the text of a file. text[position:] is what is ahead; text[start:position] the last element."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._left = limit
        self._limit = limit
        self._ended = False
        self._broken: Problem | None = None
        self._lines = 0
        self._column = 0
        self.text = ""
        self.start = 0
        self.position = 0

    def more(self) -> bool:
        """Reads on, forgetting what lies before the position; says whether there was more."""
        if self._ended:
            return False
        gone, ahead = self.text[: self.position], self.text[self.position :]
        if newlines := gone.count("\n"):
            self._lines += newlines
            self._column = len(gone) - gone.rfind("\n") - 1
        else:
            self._column += len(gone)
        # As much again as is ahead: an element is looked at a few times, not once for every chunk of it.
        data = self._file.read(max(_CHUNK, len(ahead)))
        self._left -= len(data)
        if self._left < 0:
            message = f"A JSON array may have {mebibytes(self._limit)} at most."
            raise Unreadable(Problem("FILE_TOO_LARGE", f"{message} Write the rows as JSONL, one object a line."))
        try:
            new = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            new = error.object[: error.start].decode("utf-8-sig")
            line = self._lines + ahead.count("\n") + new.count("\n") + 1
            self._broken = not_utf8(f"Line {line}", error.object[error.start])
            self._ended = True
        else:
            self._ended = not data
        self.text, self.position = ahead + new, 0
        return bool(new)

    def skip_space(self) -> None:
        """Goes to the next character that is none, if there is one."""
        while True:
            match = _SPACE.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.text) or not self.more():
                return

    def begins_with(self, character: str) -> bool:
        """Whether it is the next one but space."""
        self.skip_space()
        return self.text.startswith(character, self.position)

    def problem(self, position: int, what: str) -> Problem:
        """What is wrong at a position from where nothing can be read."""
        if self._broken is not None:
            return self._broken
        before = self.text[:position]
        newlines = before.count("\n")
        column = position - before.rfind("\n") if newlines else self._column + position + 1
        where = f"(line {self._lines + newlines + 1}, column {column})"
        message = f"The array is not JSON from here on: {what} {where}."
        fix = "The file may be cut off: upload all of it." if position >= len(self.text) else ""
        return Problem("NOT_JSON", message, fix)

    @property
    def is_broken(self) -> bool:
        """Whether the text ends because it is no text."""
        return self._broken is not None


def _nothing(_: str) -> None:
    """In place of numbers: the scan only looks for an element's end, and int() of a long one is slow."""


_scan = json.JSONDecoder(parse_int=_nothing, parse_float=_nothing, parse_constant=_nothing).raw_decode


def _element(text: _Text, limit: int) -> Problem | None:
    """Finds the next element, and goes past it; or says why there is none."""
    while True:
        try:
            _, end = _scan(text.text, text.position)
        except RecursionError:
            return Problem("TOO_DEEP", "The element nests objects or arrays too deep.")
        except json.JSONDecodeError as error:
            # Near the end of the window, and in a text without an end, more of the file may put it right.
            open_ended = error.pos + 16 > len(text.text) or error.msg.startswith("Unterminated string")
            if not open_ended:
                return text.problem(error.pos, error.msg)
            ahead, position = len(text.text) - text.position, error.pos - text.position
            if ahead > limit:
                return too_long("element", limit)
            if not text.more():
                return text.problem(text.position + position, error.msg)
            continue
        if end == len(text.text) and text.more():
            continue
        if end - text.position > limit:
            return too_long("element", limit)
        text.start, text.position = text.position, end
        return None


def _after_the_array(text: _Text) -> Iterator[Row]:
    text.skip_space()
    if text.position < len(text.text) or text.is_broken:
        yield Row(0, text.problem(text.position, "there is more after the end of the array"))


def json_object(text: bytes | str) -> dict[str, object] | Problem:
    """The object that a line or an element is, or what is wrong with it."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return not_json(text, error)
    return value if isinstance(value, dict) else not_an_object(value)


def _is_spread(head: bytes) -> bool:
    """Whether the first object ends on a later line than it begins, or so far down that the head does not show it."""
    text = head.removeprefix(codecs.BOM_UTF8).decode(errors="replace").lstrip()
    if not text.startswith("{"):
        return False
    try:
        _, end = _scan(text)
    except RecursionError:
        return False
    except json.JSONDecodeError as error:
        return len(head) >= _CHUNK and "\n" in text and error.pos + 16 > len(text)
    return "\n" in text[:end]
