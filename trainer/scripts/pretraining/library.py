"""What a CPython installation says of its standard library: docstrings, signatures, comments, topics. No module of it
is run: sources are read through `ast` and `tokenize`."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo"})


@dataclass(frozen=True)
class Described:
    """A documented object of the library: `kind` is module, class, function or method."""

    kind: str
    module: str
    qualname: str  # within the module; the module's own name for a module
    signature: str  # what the source has between the parentheses; "" where there is nothing
    parameters: tuple[str, ...]
    text: str


def library_sources(library: Path) -> Iterator[tuple[str, str]]:
    """(dotted module name, source) of every module under `library`, in order of path."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts) or not all(part.isidentifier() for part in parts):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with tokenize.open(path) as file:
                yield name, file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue


def described_objects(module: str, source: str) -> Iterator[Described]:
    """Every object of `source` that has a docstring."""
    tree = ast.parse(source)
    if text := ast.get_docstring(tree):
        yield Described("module", module, module, "", (), text)
    yield from _described_in(tree, module, (), "function")


def _described_in(tree: ast.AST, module: str, outer: tuple[str, ...], kind: str) -> Iterator[Described]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            if text := ast.get_docstring(node):
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                yield Described("class", module, ".".join((*outer, node.name)), bases, (), text)
            yield from _described_in(node, module, (*outer, node.name), "method")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                arguments = node.args
                every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                names = tuple(argument.arg for argument in every if argument.arg not in ("self", "cls"))
                yield Described(kind, module, ".".join((*outer, node.name)), ast.unparse(arguments), names, text)
        elif isinstance(node, ast.If | ast.Try):
            yield from _described_in(node, module, outer, kind)


def comment_blocks(source: str) -> Iterator[str]:
    """Runs of whole-line comments that are at least 100 characters of prose."""
    block: list[str] = []
    last_line = -2
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, IndentationError):
        return
    for token in tokens:
        if token.type != tokenize.COMMENT or token.line.strip() != token.string:
            continue
        if token.start[0] != last_line + 1:
            yield from _prose(block)
            block = []
        block.append(token.string.lstrip("#").removeprefix(" ").rstrip())
        last_line = token.start[0]
    yield from _prose(block)


def _prose(block: list[str]) -> Iterator[str]:
    text = "\n".join(block).strip()
    if len(text) >= 100 and sum(character.isalpha() for character in text) > 0.6 * len(text):
        yield text


def as_code(item: Described) -> str:
    """The object as it stands in its module."""
    if item.kind == "module":
        return f'# module {item.module}\n"""{item.text}"""'
    *outer, name = item.qualname.split(".")
    head = f"class {name}({item.signature}):" if item.kind == "class" else f"def {name}({item.signature}):"
    where = f"# {item.module}" + "".join(f", class {scope}" for scope in outer)
    return f'{where}\n{head}\n    """' + item.text.replace("\n", "\n    ") + '"""'
