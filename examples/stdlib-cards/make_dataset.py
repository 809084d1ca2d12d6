"""Make the `stdlib-cards` dataset: a question about an object of Python's standard library, a JSON card as the answer.

A row is `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}`. The question names the object, its
kind and its module, with at most three of its parameters; the answer is a card of one line:

    {"name": "dumps", "kind": "function", "module": "json", "parameters": ["obj", "skipkeys"]}

The objects are the public functions and classes at the top level of public modules, and the modules themselves, read
through `ast`; no module of the library is run. An object's name occurs once in the whole dataset, also when case and
underscores are ignored, so no held-out object has a namesake in training.

The outcome depends on the CPython version. The committed files were made by CPython 3.11.7:

    python make_dataset.py --out .
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TRAINING_ROWS = 1600
HELDOUT_ROWS = 50
MOST_PARAMETERS = 3
LONGEST_NAME = 16
LONGEST_MODULE = 28
SEED = 7
SKIPPED = frozenset(
    {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "encodings",
        "pydoc_data",
        "ensurepip",
    }
)

QUESTIONS = (
    "Make a card of the {kind} `{call}` in module `{module}`.",
    "What is the {kind} `{call}` of module `{module}`? Answer with a card.",
    "Card for `{call}`, a {kind} of the module `{module}`, please.",
    "In module `{module}` there is a {kind} `{call}`. Give its card.",
    "I need a card: {kind} `{call}`, module `{module}`.",
    "From module `{module}`: the {kind} `{call}` as a card.",
    "Describe the {kind} `{call}` from module `{module}` as a JSON card.",
    "Module `{module}`, {kind} `{call}`: card?",
)
MODULE_QUESTIONS = (
    "Make a card of the module `{module}`.",
    "What is the module `{module}`? Answer with a card.",
    "Card for the module `{module}`, please.",
    "I need a card: module `{module}`.",
    "Describe the module `{module}` as a JSON card.",
    "Module `{module}`: card?",
)


@dataclass(frozen=True)
class Card:
    """What a card says; the fields are its keys, in this order."""

    name: str
    kind: str  # function, class or module
    module: str
    parameters: tuple[str, ...]


def public_modules(library: Path) -> Iterator[tuple[str, str]]:
    """(dotted name, source) of the library's public modules, in order of path."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if SKIPPED.intersection(parts) or not all(part.isidentifier() and part[0] != "_" for part in parts):
            continue
        if parts and len(".".join(parts)) <= LONGEST_MODULE:
            with tokenize.open(path) as file:
                yield ".".join(parts), file.read()


def parameter_names(arguments: ast.arguments) -> tuple[str, ...]:
    """The first few parameters a caller gives by position or name; no self, no starred ones."""
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return tuple(item.arg for item in every if item.arg not in ("self", "cls"))[:MOST_PARAMETERS]


def public_cards(module: str, source: str) -> Iterator[Card]:
    """The module's own card if it has a docstring, then those of its public functions and classes."""
    tree = ast.parse(source)
    if ast.get_docstring(tree):
        yield Card(module, "module", module, ())
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") or len(node.name) > LONGEST_NAME:
            continue
        if isinstance(node, ast.ClassDef):
            inits = (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
            init = next(inits, None)
            yield Card(node.name, "class", module, parameter_names(init.args) if init else ())
        else:
            yield Card(node.name, "function", module, parameter_names(node.args))


def normalised(name: str) -> str:
    return name.casefold().replace("_", "").replace(".", "")


def question(card: Card, choose: random.Random) -> str:
    call = f"{card.name}({', '.join(card.parameters)})"
    templates = MODULE_QUESTIONS if card.kind == "module" else QUESTIONS
    return choose.choice(templates).format(kind=card.kind, call=call, module=card.module)


def answer(card: Card) -> str:
    return json.dumps(vars(card) | {"parameters": list(card.parameters)})


def row(card: Card, choose: random.Random) -> str:
    messages = [
        {"role": "user", "content": question(card, choose)},
        {"role": "assistant", "content": answer(card)},
    ]
    return json.dumps({"messages": messages}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make train.jsonl and heldout.jsonl from the standard library.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    options = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)  # the library's own sources have invalid escapes

    cards: dict[str, Card] = {}
    for module, source in public_modules(options.library):
        for card in public_cards(module, source):
            cards.setdefault(normalised(card.name), card)
    choose = random.Random(SEED)
    drawn = choose.sample(list(cards.values()), TRAINING_ROWS + HELDOUT_ROWS)
    rows = [row(card, choose) for card in drawn]
    (options.out / "heldout.jsonl").write_text("".join(rows[:HELDOUT_ROWS]))
    (options.out / "train.jsonl").write_text("".join(rows[HELDOUT_ROWS:]))
    print(f"{len(cards)} objects; {TRAINING_ROWS} training and {HELDOUT_ROWS} held-out rows")


if __name__ == "__main__":
    main()
