"""Documented objects retold as ChatML conversations in plain prose, so that the special tokens are trained, and
conversations about invented objects, so that names are picked out of a question and not known by heart. No answer is
JSON."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from pretraining.library import Described
from pretraining.untrained import TURN_END, TURN_START

QUESTIONS = (
    "What is the {kind} `{call}` of the module `{module}`?",
    "What does the {kind} `{call}` in `{module}` do?",
    "Explain the {kind} `{module}.{call}`.",
    "Describe `{call}`, a {kind} of `{module}`.",
    "In the module `{module}`, what is the {kind} `{name}`?",
    "Tell me about `{module}.{name}`, a {kind}.",
    "from {module} import {top}\n\nWhat is the {kind} `{call}`?",
)
MODULE_QUESTIONS = (
    "What is the module `{module}` for?",
    "What does the module `{module}` do?",
    "import {module}\n\nWhat is this module?",
    "Describe `{module}`, a module.",
    "Explain the module `{module}`.",
)
ANSWERS = (
    "The {kind} `{name}` is in the module `{module}`. {parameters}{summary}",
    "`{name}` is a {kind} of `{module}`. {parameters}{summary}",
    "The module `{module}` has the {kind} `{name}`. {parameters}{summary}",
    "{summary} The name of this {kind} is `{name}`; it is in `{module}`. {parameters}",
    "`{module}.{name}` is a {kind}. {parameters}{summary}",
    "Name: `{name}`. Kind: {kind}. Module: `{module}`. {parameters}{summary}",
)
MODULE_ANSWERS = (
    "`{module}` is a module. {summary}",
    "The module `{module}`: {summary}",
    "Name: `{module}`. Kind: module. {summary}",
)
FOLLOW_UPS = (
    ("Which module is it in?", "The {kind} `{name}` is in the module `{module}`."),
    ("What is its name?", "Its name is `{name}`."),
    ("What kind of object is it?", "It is a {kind}: `{name}` of `{module}`."),
    ("What are its parameters?", "{parameters}"),
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You know Python's standard library.", "Answer briefly.")


def as_chat(item: Described, choose: random.Random) -> str:
    """A conversation about the object, in the chat template's form; the phrasing is drawn from `choose`."""
    name = item.qualname.rsplit(".", 1)[-1]
    top = item.qualname.split(".")[0]
    signature = item.signature if len(item.signature) <= 80 else ", ".join(item.parameters[:6])
    call = f"{item.qualname}({signature})" if item.kind != "class" or item.signature else item.qualname
    listed = ", ".join(f"`{parameter}`" for parameter in item.parameters[:6])
    words: dict[str, str] = {
        "kind": item.kind,
        "module": item.module,
        "name": name,
        "top": top,
        "call": call,
        "parameters": f"Its parameters are {listed}. " if listed else "It has no parameters. ",
        "summary": " ".join(item.text.split("\n\n")[0].split())[:400],
    }
    if item.kind == "class":
        words["parameters"] = f"Its base is `{item.signature}`. " if item.signature else ""
    questions, answers = (MODULE_QUESTIONS, MODULE_ANSWERS) if item.kind == "module" else (QUESTIONS, ANSWERS)
    turns: list[tuple[str, str]] = []
    if choose.random() < 0.1:
        turns.append(("system", choose.choice(SYSTEM_PROMPTS)))
    turns.append(("user", choose.choice(questions).format_map(words)))
    turns.append(("assistant", choose.choice(answers).format_map(words)))
    if item.kind in ("function", "method") and choose.random() < 0.3:
        question, answer = choose.choice(FOLLOW_UPS)
        turns += [("user", question), ("assistant", answer.format_map(words))]
    return "".join(f"{TURN_START}{role}\n{content.strip()}{TURN_END}\n" for role, content in turns)


def invented_objects(items: list[Described], count: int, choose: random.Random) -> Iterator[Described]:
    """Objects that do not exist, named with words of real ones: what is said of them must be read off the question."""
    names = [item.qualname.rsplit(".", 1)[-1] for item in items]
    words = sorted({word for name in names for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)})
    modules = sorted({item.module for item in items})
    parameters = [parameter for item in items for parameter in item.parameters]
    for _ in range(count):
        kind = choose.choice(("function", "class"))
        parts = choose.sample(words, choose.choice((1, 2, 2, 3)))
        if kind == "class":
            name = "".join(part.capitalize() for part in parts)
            listed: tuple[str, ...] = ()
            signature = choose.choice(words).capitalize()
        else:
            name = choose.choice(("_", "_", "")).join(part.lower() for part in parts)
            listed = tuple(dict.fromkeys(choose.sample(parameters, choose.randint(0, 4))))
            signature = ", ".join(listed)
        module = choose.choice(modules)
        if choose.random() < 0.5:
            module = ".".join(part.lower() for part in choose.sample(words, choose.choice((1, 2))))
        yield Described(kind, module, name if not name[0].isdigit() else f"x{name}", signature, listed, "")
