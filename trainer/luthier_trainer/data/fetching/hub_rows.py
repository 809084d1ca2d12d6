"""The rows of a hub dataset's split as Arrow tables, images as bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_trainer.data.fetching.hub_card import Repository, leads_outside

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 1000
_MEDIA_BATCH_ROWS = 50


def streamed(dataset: Any, repository: Repository, token: str) -> "Iterator[pa.Table]":
    """Yields the rows of a dataset that `datasets` streams, in tables of bounded size. Raises FetchError when a row
    names a file that is not one of the repository."""
    from datasets.features.features import require_storage_embed

    features = dataset.features
    media = features is not None and any(map(require_storage_embed, features.values()))
    if media:
        dataset = dataset.decode(False)
    for table in dataset.with_format("arrow").iter(_MEDIA_BATCH_ROWS if media else _BATCH_ROWS):
        yield _embedded(table.cast(dataset.features.arrow_schema), repository, token) if media else table


def of_parquet(path: Path, repository: Repository, token: str) -> "Iterator[pa.Table]":
    """Yields the rows of a Parquet file of the repository, which is here already; otherwise as `streamed`."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features
    from datasets.features.features import require_storage_embed

    with pq.ParquetFile(path) as file:
        metadata = file.schema_arrow.metadata or {}
        typed = b"huggingface" in metadata
        media = typed and any(map(require_storage_embed, Features.from_arrow_schema(file.schema_arrow).values()))
        for batch in file.iter_batches(_MEDIA_BATCH_ROWS if media else _BATCH_ROWS):
            table = pa.Table.from_batches([batch]).replace_schema_metadata(metadata)
            if media:
                yield _embedded(table, repository, token)
            else:
                for column in table.columns:
                    _judge_paths(column, None, repository)
                yield table


def _embedded(table: "pa.Table", repository: Repository, token: str) -> "pa.Table":
    """The table with the bytes of images that it names by their path."""
    from datasets.table import embed_table_storage

    for column in table.columns:
        _judge_paths(column, repository.prefix, repository)
    return embed_table_storage(table, {repository.id: token or False})


def _judge_paths(column: Any, prefix: str | None, repository: Repository) -> None:
    """Raises FetchError when a row names a file in place of an image's bytes, unless its path has the prefix."""
    import pyarrow as pa

    for array in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if pa.types.is_struct(array.type):
            if {field.name for field in array.type} == {"bytes", "path"}:
                missing = pa.compute.filter(array.field("path"), pa.compute.is_null(array.field("bytes")))
                for path in missing.to_pylist():
                    if path is not None and not (prefix and _is_within(path, prefix)):
                        raise leads_outside(repository.id, path)
            else:
                for child in array.flatten():
                    _judge_paths(child, prefix, repository)
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            _judge_paths(array.flatten(), prefix, repository)


def _is_within(path: str, prefix: str) -> bool:
    """Whether a path leads to a file of the repository, or into an archive of it."""
    inner, _, outer = path.rpartition("::")
    is_plain = not inner or (inner.startswith("zip://") and "::" not in inner)
    return is_plain and outer.startswith(prefix) and ".." not in outer.split("/")
