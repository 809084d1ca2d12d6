"""Score answers on the `stdlib-cards` dataset. Standard library only.

A card is valid when the whole answer is one JSON object with exactly the keys name, kind, module and parameters, with
a string for a name, a list of strings as parameters, and the kind and the module of the question.

The name and the parameters are not compared: `builtin/tiny` copies rare names with mistakes, so a right name is within
reach for 43 to 45 of the 50 rows only, where form, kind and module are right in 47 or 48.
`named_card` compares the name too, `exact_card` everything.

    python score.py answers.jsonl      # rows of {"question": ..., "answer": ...}
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

KINDS = frozenset({"function", "class", "module"})
_MODULE = re.compile(r"\bmodule `([\w.]+)`", re.IGNORECASE)
_CALL = re.compile(r"\b(function|class) `(\w+)\(([^)]*)\)`|`(\w+)\(([^)]*)\)`, a (function|class)\b")


def parse_card(text: str) -> dict[str, object] | None:
    """The card's fields when the text is one JSON object with the right keys and types, else None."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(card, dict) or set(card) != {"name", "kind", "module", "parameters"}:
        return None
    if not isinstance(card["name"], str) or not isinstance(card["module"], str) or card["kind"] not in KINDS:
        return None
    parameters = card["parameters"]
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        return None
    return card


def expected_card(question: str) -> dict[str, object]:
    """The card a question of this dataset asks for; ValueError when it is not such a question."""
    module = _MODULE.search(question)
    if module is None:
        raise ValueError(f"no module in the question {question!r}")
    call = _CALL.search(question)
    if call is None:
        return {"name": module[1], "kind": "module", "module": module[1], "parameters": []}
    name, kind, listed = (call[2], call[1], call[3]) if call[1] else (call[4], call[6], call[5])
    parameters = listed.split(", ") if listed else []
    return {"name": name, "kind": kind, "module": module[1], "parameters": parameters}


def valid_card(text: str, question: str | None = None) -> bool:
    """Whether the text is a valid card; without a question, only its form is looked at."""
    card = parse_card(text)
    if card is None or question is None:
        return card is not None
    expected = expected_card(question)
    return card["kind"] == expected["kind"] and card["module"] == expected["module"]


def named_card(text: str, question: str) -> bool:
    """Whether the text is a valid card with the name that the question has."""
    card = parse_card(text)
    return card is not None and valid_card(text, question) and card["name"] == expected_card(question)["name"]


def exact_card(text: str, question: str) -> bool:
    """Whether the text is the very card that the question asks for, parameters included."""
    return parse_card(text) == expected_card(question)


def score(answers: Iterable[tuple[str, str]]) -> int:
    """How many of the (question, answer) pairs have a valid card."""
    return sum(valid_card(answer, question) for question, answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the valid cards in a file of questions and answers.")
    parser.add_argument("answers", type=Path, help='JSON lines of {"question": ..., "answer": ...}')
    rows = [json.loads(line) for line in parser.parse_args().answers.read_text().splitlines()]
    pairs = [(row["question"], row["answer"]) for row in rows]
    well_formed = sum(valid_card(answer) for _, answer in pairs)
    named = sum(named_card(answer, question) for question, answer in pairs)
    exact = sum(exact_card(answer, question) for question, answer in pairs)
    print(f"valid {score(pairs)}, well-formed {well_formed}, named {named}, exact {exact}, of {len(pairs)}")


if __name__ == "__main__":
    main()
