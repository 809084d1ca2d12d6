"""Rows that are in a dataset twice, and prompts with more than one answer.

A row is compared by what is trained on it (its record), not by how it is written: keys that no format knows make no row
another. Of each row two 64-bit hashes are kept with its line, 24 bytes; beyond BUFFER_BYTES they go to files, one for
each value of a hash's first byte, and are judged file by file. Two rows of a million with one hash by chance: 1 in 30
million.
"""

import struct
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from luthier_trainer.data.doctor.findings import Findings
from luthier_trainer.data.doctor.texts import serialized
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.records import Chat, Preference, Prompt, Record, Text, Unpaired

BUFFER_BYTES = 32 * 1024 * 1024
MAX_JUDGED_AT_ONCE = 500_000
"""Rows whose hashes are in memory as Python objects, about 150 bytes each."""

_ENTRY = struct.Struct("<QQQ")
_PARTITIONS = 256
_CHUNK = _ENTRY.size * 40_000


def content(record: Record) -> tuple[bytes | None, bytes]:
    """What a row says, in canonical bytes, in two parts: the prompt, where a prompt should come once (all before the
    last answer of a conversation, or a prompt alone), and the rest."""
    match record:
        case Chat():
            messages = record.messages
            answer = len(messages) - 1
            while answer > 0 and messages[answer]["role"] != "assistant":
                answer -= 1
            if answer <= 0:
                return None, serialized((messages, record.tools))
            return serialized((messages[:answer], record.tools)), serialized(messages[answer:])
        case Text():
            return None, serialized(record.text)
        case Preference():
            return None, serialized((record.prompt, record.chosen, record.rejected, record.tools))
        case Unpaired():
            return None, serialized((record.messages, record.label, record.tools))
        case Prompt():
            return serialized((record.messages, record.tools)), serialized(record.reference)


def digests(prompt: bytes | None, rest: bytes) -> tuple[bytes, bytes]:
    """The hashes, 8 bytes each, of the prompt and of the whole; the same one twice where there is no prompt."""
    if prompt is None:
        whole = blake2b(rest, digest_size=8).digest()
        return whole, whole
    state = blake2b(prompt, digest_size=8)
    first = state.digest()
    state.update(rest)
    return first, state.digest()


class Duplicates:
    """Takes the hashes of rows in the order of the file, and finds what is equal among them at the end.

    `scratch` is a folder for files named `duplicates-NN`; they are gone after `judge`. Raises OSError when they cannot
    be written.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._buffers = [bytearray() for _ in range(_PARTITIONS)]
        self._counts = [0] * _PARTITIONS
        self._buffered = 0
        self._spilled = False

    def add(self, line: int, prompt: bytes, whole: bytes) -> None:
        """Takes a row's hashes. Lines rise from one call to the next."""
        self._buffers[prompt[0]] += prompt + whole + line.to_bytes(8, "little")
        self._buffered += _ENTRY.size
        if self._buffered >= BUFFER_BYTES:
            self._spill()

    def judge(self, findings: Findings) -> None:
        """Adds a finding for each row that repeats one before it (DUPLICATE_ROW), and for each other one that answers a
        prompt which was there before (SAME_PROMPT)."""
        for partition in range(_PARTITIONS):
            self._judge(partition, findings)
            self._file(partition).unlink(missing_ok=True)
            self._buffers[partition].clear()

    def _judge(self, partition: int, findings: Findings) -> None:
        count = self._counts[partition] + len(self._buffers[partition]) // _ENTRY.size
        passes = -(-count // MAX_JUDGED_AT_ONCE)
        prompts: dict[int, int] = {}
        for number in range(passes):
            rows: dict[int, int] = {}
            for prompt, whole, line in self._entries(partition):
                first_prompt = prompts.setdefault(prompt, line)
                if passes > 1 and whole % passes != number:
                    continue
                first = rows.setdefault(whole, line)
                if first != line:
                    findings.add(line, _duplicate(line, first))
                elif first_prompt != line:
                    findings.add(line, _same_prompt(line, first_prompt))

    def _entries(self, partition: int) -> Iterator[tuple[int, int, int]]:
        """The hashes of prompt and whole and the line of each row of a partition, in the order of the file."""
        if self._spilled and (path := self._file(partition)).exists():
            with open(path, "rb") as file:
                while chunk := file.read(_CHUNK):
                    yield from _ENTRY.iter_unpack(chunk)
        yield from _ENTRY.iter_unpack(self._buffers[partition])

    def _spill(self) -> None:
        for partition, buffer in enumerate(self._buffers):
            if buffer:
                with open(self._file(partition), "ab") as file:
                    file.write(buffer)
                self._counts[partition] += len(buffer) // _ENTRY.size
                self._buffers[partition] = bytearray()
        self._buffered = 0
        self._spilled = True

    def _file(self, partition: int) -> Path:
        return self._scratch / f"duplicates-{partition:02x}"


def _duplicate(line: int, first: int) -> Problem:
    fix = "Remove it, unless it is meant to count twice."
    return Problem("DUPLICATE_ROW", f"Line {line} repeats line {first}.", fix, Level.WARNING)


def _same_prompt(line: int, first: int) -> Problem:
    message = f"Line {line} has the prompt of line {first} and another answer."
    return Problem("SAME_PROMPT", message, "See that the answers do not contradict each other.", Level.NOTE)
