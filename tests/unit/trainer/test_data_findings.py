"""The collector of findings: what is listed when there are too many, and that every count is exact."""

import random

from luthier.v1 import dataset_report_pb2
from luthier_trainer.data.doctor.findings import MAX_LISTED, MAX_LISTED_OF_ONE_CODE, MAX_TEXT, Findings
from luthier_trainer.data.problem import Level, Problem

ERROR = Problem("NOT_JSON", "The row is not JSON.", "Write JSON.")
WARNING = Problem("DUPLICATE_ROW", "Line 2 repeats line 1.", level=Level.WARNING)
NOTE = Problem("SAME_PROMPT", "A prompt comes twice.", level=Level.NOTE)


def shown(findings: Findings) -> list[tuple[int, str]]:
    return [(finding.line, finding.code) for finding in findings.listed()]


def test_errors_come_first_and_the_rest_by_line() -> None:
    findings = Findings()
    for line, problem in [(7, NOTE), (3, WARNING), (9, ERROR), (3, NOTE), (2, ERROR), (0, WARNING)]:
        findings.add(line, problem)
    assert shown(findings) == [
        (2, "NOT_JSON"),
        (9, "NOT_JSON"),
        (0, "DUPLICATE_ROW"),
        (3, "DUPLICATE_ROW"),
        (3, "SAME_PROMPT"),
        (7, "SAME_PROMPT"),
    ]
    assert findings.errors == 2


def test_a_finding_carries_level_code_line_message_and_fix() -> None:
    findings = Findings()
    findings.add(4, ERROR)
    assert findings.listed() == [
        dataset_report_pb2.Finding(
            level=dataset_report_pb2.FINDING_LEVEL_ERROR,
            code="NOT_JSON",
            line=4,
            message="The row is not JSON.",
            fix="Write JSON.",
        )
    ]


def test_the_lowest_lines_are_kept_in_whatever_order_they_are_found() -> None:
    lines = list(range(1, 5001))
    random.Random(0).shuffle(lines)
    findings = Findings()
    for line in lines:
        findings.add(line, ERROR)
        findings.add(line, WARNING)
    assert shown(findings) == [(line, "NOT_JSON") for line in range(1, MAX_LISTED + 1)]
    only_warnings = Findings()
    for line in lines:
        only_warnings.add(line, WARNING)
    assert [line for line, _ in shown(only_warnings)] == list(range(1, MAX_LISTED_OF_ONE_CODE + 1))


def test_counts_are_exact_beyond_what_is_listed() -> None:
    findings = Findings()
    for line in range(5000):
        findings.add(line, ERROR)
    for line in range(3000):
        findings.add(line, WARNING)
    findings.add(1, NOTE)
    counts = [(count.level, count.code, count.count) for count in findings.counts()]
    assert counts == [(1, "NOT_JSON", 5000), (2, "DUPLICATE_ROW", 3000), (3, "SAME_PROMPT", 1)]
    assert findings.errors == 5000
    assert len(findings.listed()) == MAX_LISTED


def test_a_rare_kind_at_the_end_is_not_crowded_out() -> None:
    findings = Findings()
    for code in range(8):
        for line in range(1, 1000):
            findings.add(line, Problem(f"CODE_{code}", "So.", level=Level.WARNING))
    findings.add(10**6, NOTE)
    for line in range(1, 5000):
        findings.add(line, ERROR)
    assert (10**6, "SAME_PROMPT") not in shown(findings)  # a thousand errors leave room for nothing else
    without_errors = Findings()
    for code in range(8):
        for line in range(1, 1000):
            without_errors.add(line, Problem(f"CODE_{code}", "So.", level=Level.WARNING))
    without_errors.add(10**6, NOTE)
    assert shown(without_errors)[-1] == (10**6, "SAME_PROMPT")
    rare_error = Findings()
    for line in range(1, 5000):
        rare_error.add(line, ERROR)
    rare_error.add(5000, Problem("BAD_ROLE", "So."))
    assert shown(rare_error)[-1] == (5000, "BAD_ROLE")
    assert len(rare_error.listed()) == MAX_LISTED


def test_a_text_that_no_message_can_hold_is_shortened_and_made_to_fit() -> None:
    findings = Findings()
    findings.add(1, Problem("BAD_ROLE", "a\ud800" + "b" * 10_000))
    (finding,) = findings.listed()
    assert len(finding.message) == MAX_TEXT
    assert finding.message.startswith("a?b")
    finding.SerializeToString()
