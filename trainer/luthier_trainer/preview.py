"""Rows as a base model will see them: turns, text, tokens, and which tokens are trained."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.trainer.v1 import task_pb2
from luthier.v1 import dataset_report_pb2, datasets_pb2, tokenization_pb2
from luthier_trainer.data.doctor.findings import Findings
from luthier_trainer.data.formats import records
from luthier_trainer.data.problem import Level, Problem
from luthier_trainer.data.reading import Reading
from luthier_trainer.data.records import Message, Passage, Prompt, Record, passages, plain
from luthier_trainer.stop import Check

if TYPE_CHECKING:
    from luthier_trainer.data.tokens.task import Tokens

_MOST_TEXT = 64 * 1024
_MOST_ANSWER = 3 * 1024 * 1024
"""Bytes of an answer, about: a client takes 4 MiB of any server unless it asks for more."""
_ROWS = 3


def preview(task: task_pb2.TrainerTask, check: Check) -> datasets_pb2.PreviewDatasetResponse:
    """The rows that `task.preview` asks for. Without a base model they have turns alone, and nothing of transformers is
    loaded. Raises TrainingError MODEL_NOT_FOUND, and as `template_of` and `render` what no row can be blamed for."""
    tokens: Tokens | None = None
    response = datasets_pb2.PreviewDatasetResponse()
    if task.base_model.location:
        from luthier_trainer.data.tokens.task import tokens_for

        tokens = tokens_for(task)
    methods: list[str] = []
    train_on = task.spec.fine_tune.tokenization.train_on
    size = 0
    for line, record in _chosen(task, check):
        if size > _MOST_ANSWER:
            last = response.rows[-1]
            problem = Problem(
                "PREVIEW_CUT", f"The preview ends here: with line {line} it would be too large.", level=Level.NOTE
            )
            last.findings.extend(_found(last.line, problem))
            break
        row = response.rows.add(line=line)
        findings = Findings()
        if isinstance(record, Problem):
            findings.add(line, record)
        else:
            if isinstance(record, Prompt):
                row.reference_json = _json(record.reference)
            for passage in passages(record):
                sequence = row.sequences.add(name=passage.name, turns=_turns(passage, train_on))
                if tokens is None:
                    sequence.text = _cut(passage.text or "")
                else:
                    from luthier_trainer.data.tokens.seen import see

                    text, method, problems = see(passage, tokens, sequence)
                    sequence.text = _cut(text)
                    methods += [method] if method else []
                    for problem in problems:
                        findings.add(line, problem)
        row.findings.extend(findings.listed())
        if (large := row.ByteSize()) > _MOST_ANSWER:
            _shrink(row)
            large = row.ByteSize()
        size += large
    if tokens is not None:
        response.mask_method = max(methods, key=methods.count, default="")
        only_texts = bool(response.rows) and not any(each.turns for row in response.rows for each in row.sequences)
        response.template_sha256 = "" if only_texts else tokens.template_sha256
    return response


def _found(line: int, problem: Problem) -> list[dataset_report_pb2.Finding]:
    findings = Findings()
    findings.add(line, problem)
    return findings.listed()


def _shrink(row: datasets_pb2.PreviewRow) -> None:
    """Leaves of a row's sequences the first turns and tokens that fit."""
    for sequence in row.sequences:
        while len(sequence.turns) > 1 and sequence.ByteSize() > _MOST_ANSWER // (2 * len(row.sequences)):
            del sequence.turns[len(sequence.turns) // 2 :]
        while len(sequence.tokens) > 1 and sequence.ByteSize() > _MOST_ANSWER // len(row.sequences):
            del sequence.tokens[len(sequence.tokens) // 2 :]
    message = "The row is too large to be shown whole: its first turns and tokens are."
    row.findings.extend(_found(row.line, Problem("PREVIEW_CUT", message, level=Level.NOTE)))


def _chosen(task: task_pb2.TrainerTask, check: Check) -> Iterator[tuple[int, Record | Problem]]:
    """The lines that were asked for, those that are not there as a problem; else the first rows."""
    lines = sorted(set(task.preview.lines))
    source = task.training_dataset
    left = set(lines)
    shown = 0
    with records(Path(source.path), Reading.from_proto(source.reading)) as found:
        for line, record, _ in found:
            check()
            if lines:
                if line in left or not line:
                    yield line, record
                    left.discard(line)
                if line and not left:
                    return
            else:
                yield line, record
                shown += 1
                if shown >= (task.preview.count or _ROWS):
                    return
    for line in sorted(left):
        yield line, Problem("NO_SUCH_LINE", f"There is no row at line {line}.", "Ask for a line of the file.")


def _turns(passage: Passage, train_on: tokenization_pb2.TrainOn.ValueType) -> Iterator[datasets_pb2.PreviewTurn]:
    messages = passage.messages or []
    last = max((n for n, turn in enumerate(messages) if turn["role"] == "assistant"), default=-1)
    for number, turn in enumerate(messages):
        calls = turn.get("tool_calls")
        yield datasets_pb2.PreviewTurn(
            role=turn["role"],
            content=_cut(plain(turn)),
            tool_calls_json=_json(calls) if calls else "",
            trained=not passage.to_answer and _is_trained(turn, number == last, train_on),
        )


def _is_trained(turn: Message, is_last: bool, train_on: tokenization_pb2.TrainOn.ValueType) -> bool:
    if train_on == tokenization_pb2.TRAIN_ON_ALL_TOKENS:
        return True
    if turn["role"] != "assistant" or turn.get("weight") == 0:
        return False
    return is_last or train_on != tokenization_pb2.TRAIN_ON_LAST_TURN


def _json(value: object) -> str:
    return _cut(json.dumps(value, ensure_ascii=False, default=str))


def _cut(text: str) -> str:
    """At most 64 KiB, and what a protobuf string takes: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace")[:_MOST_TEXT].decode("utf-8", "ignore")
