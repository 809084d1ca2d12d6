"""What is thrown at the server: a file, or a chat template, each made from its number alone."""

from dataclasses import dataclass, field
from random import Random

from luthier.v1.dataset_pb2 import DatasetReading
from luthier.v1.tokenization_pb2 import Tokenization

MARK = "luthier-escape"
"""Part of every name that leads out of an archive: no file of such a name may ever be."""

SECRET = b"5f0c: what stands beside the data directory is nobody's to read"
SECRET_PATH = "canary/secret.txt"
"""Beside the data directory; `../../../` leads there from a file that came, and `../` from where the server runs."""


@dataclass(frozen=True, slots=True)
class File:
    """A dataset file and how it is said to be read. base: what it was made of."""

    base: str
    content: bytes
    reading: DatasetReading = field(default_factory=DatasetReading)


@dataclass(frozen=True, slots=True)
class Template:
    """A way to tokenise, for a preview. base: what it was made of."""

    base: str
    tokenization: Tokenization
    rows: int = 3
    max_length: int = 512


@dataclass(frozen=True, slots=True)
class Mutant:
    """One throw. keep: whether the file is uploaded for good, and not only to be checked."""

    number: int
    mutation: str
    what: File | Template
    keep: bool = False


def random_of(number: int) -> Random:
    """The source of everything that is random in a mutant."""
    return Random(f"mutant {number}")
