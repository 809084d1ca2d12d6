"""Formats of rows, and how each becomes a record. Standard library and orjson only."""

from luthier_trainer.data.formats.convert import convert
from luthier_trainer.data.formats.detect import detect
from luthier_trainer.data.formats.file import Records, records

__all__ = ["Records", "convert", "detect", "records"]
