"""The mutations by name: how each is made, and how often it comes."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from mutations import (
    archives,
    compression,
    damage,
    images,
    readings,
    tables,
    templates,
    texts,
    values,
    volumes,
)
from mutations.mutant import File, Mutant, Template, random_of


@dataclass(frozen=True, slots=True)
class Plan:
    """weight: how often, beside the others; heavy: may keep a core busy for seconds."""

    make: Callable[[Random], File | Template]
    weight: float
    heavy: bool = False


TABLE: dict[str, Plan] = {
    "cut off": Plan(damage.truncated, 8),
    "without its head": Plan(damage.beheaded, 3),
    "bytes changed": Plan(damage.flipped, 10),
    "bytes put in": Plan(damage.inserted, 6),
    "pieces moved": Plan(damage.moved, 6),
    "two files in one": Plan(damage.spliced, 3),
    "noise": Plan(damage.noise, 3),
    "blank": Plan(texts.empty, 2),
    "crumbs": Plan(texts.crumbs, 3),
    "another encoding": Plan(texts.other_encoding, 2),
    "byte order marks": Plan(texts.marked, 2),
    "line ends": Plan(texts.line_ends, 2),
    "bad UTF-8": Plan(texts.bad_utf8, 3),
    "wrong types": Plan(values.wrong_type, 12),
    "huge numbers": Plan(values.huge_number, 4),
    "surrogates and controls": Plan(values.surrogate, 4),
    "deep values": Plan(values.nested, 3),
    "nothing but depth": Plan(values.nested_whole, 1),
    "keys missing": Plan(values.missing_key, 5),
    "keys twice": Plan(values.duplicate_key, 3),
    "enormous keys": Plan(values.enormous_key, 1),
    "odd turns": Plan(values.wrong_order, 5),
    "formats mixed": Plan(values.mixed, 2),
    "JSON that is no rows": Plan(values.not_rows, 3),
    "tiny rows": Plan(volumes.tiny_rows, 0.4, heavy=True),
    "one long line": Plan(volumes.long_line, 0.4, heavy=True),
    "many turns": Plan(volumes.many_turns, 0.4, heavy=True),
    "rows alike": Plan(volumes.alike, 0.4, heavy=True),
    "slow to scan": Plan(volumes.slow_to_scan, 0.6, heavy=True),
    "compressed and broken": Plan(compression.broken, 4),
    "compressed and joined": Plan(compression.joined, 2),
    "compressed in layers": Plan(compression.layered, 1),
    "odd compressed headers": Plan(compression.headers, 2),
    "gzip and zstd bombs": Plan(compression.bomb, 0.8, heavy=True),
    "names out of a zip": Plan(archives.escaping, 4),
    "names twice in a zip": Plan(archives.twice, 1),
    "lies in a zip": Plan(archives.lying, 4),
    "broken zip": Plan(archives.broken, 3),
    "zip bombs": Plan(archives.bomb, 0.8, heavy=True),
    "members without end": Plan(archives.many_members, 0.3, heavy=True),
    "tables changed": Plan(tables.flipped, 8),
    "tables cut": Plan(tables.cut, 3),
    "lengths in tables": Plan(tables.lengths, 6),
    "types of columns": Plan(tables.types, 4),
    "nested columns": Plan(tables.nested, 1),
    "odd tables": Plan(tables.wide, 1),
    "dictionaries": Plan(tables.dictionaries, 1),
    "tables that grow": Plan(tables.repeated, 0.6, heavy=True),
    "odd CSV": Plan(tables.csv, 3),
    "addresses of images": Plan(images.addresses, 4),
    "odd pictures": Plan(images.pictures, 2),
    "other formats named": Plan(readings.formats, 4),
    "odd columns named": Plan(readings.columns, 4),
    "template: little becomes much": Plan(templates.laughs, 1.3),
    "template: much at once": Plan(templates.at_once, 0.9),
    "template: without end": Plan(templates.loops, 0.7),
    "template: ways out": Plan(templates.escapes, 0.9),
    "template: hard to compile": Plan(templates.sources, 1),
    "template: not the row": Plan(templates.turned, 0.5),
    "template: damaged": Plan(templates.damaged, 0.6),
    "template: odd options": Plan(templates.options, 0.4),
}

_KEPT = 0.1


def is_template(mutation: str) -> bool:
    """Whether it makes templates."""
    return mutation.startswith("template: ")


def mutation_of(number: int) -> str:
    """Which mutation the mutant of that number has."""
    return random_of(number).choices(list(TABLE), [plan.weight for plan in TABLE.values()])[0]


def mutant(number: int, mutation: str = "") -> Mutant:
    """The mutant of that number; with `mutation` the one that it would be of that kind."""
    random = random_of(number)
    drawn = random.choices(list(TABLE), [plan.weight for plan in TABLE.values()])[0]
    mutation = mutation or drawn
    what = TABLE[mutation].make(random)
    return Mutant(number, mutation, what, random.random() < _KEPT)
