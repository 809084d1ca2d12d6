"""How a dataset's file is read: `luthier.v1.DatasetReading` as a value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from luthier.v1 import dataset_pb2


class FileFormat(StrEnum):
    """How a file is written. Compression is told from the bytes."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"
    ARROW = "arrow"
    ZIP = "zip"


class Format(StrEnum):
    """How a row looks."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    INSTRUCTION = "instruction"
    SHAREGPT = "sharegpt"
    TEXT = "text"
    PREFERENCE = "preference"
    UNPAIRED_PREFERENCE = "unpaired_preference"
    PROMPT_ONLY = "prompt_only"


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file is read; None and an empty mapping leave it to detection. columns: from the field that a format has
    (`prompt`) to the file's column (`question`)."""

    file_format: FileFormat | None = None
    format: Format | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_proto(cls, reading: dataset_pb2.DatasetReading) -> "Reading":
        """The same from the contract's message."""
        return cls(
            FileFormat(_short("FILE_FORMAT_", dataset_pb2.FileFormat.Name(reading.file_format)))
            if reading.file_format
            else None,
            Format(_short("DATASET_FORMAT_", dataset_pb2.DatasetFormat.Name(reading.format)))
            if reading.format
            else None,
            dict(reading.columns),
        )

    def to_proto(self) -> dataset_pb2.DatasetReading:
        """The same as the contract's message."""
        reading = dataset_pb2.DatasetReading(columns=self.columns)
        if self.file_format is not None:
            reading.file_format = dataset_pb2.FileFormat.Value(f"FILE_FORMAT_{self.file_format.name}")
        if self.format is not None:
            reading.format = dataset_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{self.format.name}")
        return reading


def _short(prefix: str, name: str) -> str:
    return name.removeprefix(prefix).lower()
