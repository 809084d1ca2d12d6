"""Requests about datasets, made of what people write: names for enums, mappings for messages."""

import difflib
from collections.abc import Mapping, Sequence

from luthier.v1.dataset_pb2 import DatasetFormat, DatasetReading, FileFormat
from luthier.v1.datasets_pb2 import (
    CheckDatasetRequest,
    ConcatenateDatasets,
    DeriveDatasetRequest,
    HubDataset,
    ImportDatasetRequest,
    PreviewDatasetRequest,
    SampleDataset,
    SplitDataset,
)
from luthier.v1.tokenization_pb2 import Tokenization
from luthier_client import enums

TokenizationLike = Tokenization | Mapping[str, str]
"""How rows become tokens: the message, or its fields as a job file has them, such as `{"train_on": "last_turn"}`."""


def reading_of(file_format: str = "", format: str = "", columns: Mapping[str, str] | None = None) -> DatasetReading:
    """How a file is read; what is empty is left to detection. Raises ValueError for a name that is none."""
    reading = DatasetReading(columns=columns)
    if file_format:
        reading.file_format = FileFormat.ValueType(enums.number(FileFormat.DESCRIPTOR, file_format))
    if format:
        reading.format = DatasetFormat.ValueType(enums.number(DatasetFormat.DESCRIPTOR, format))
    return reading


def tokenization_of(given: TokenizationLike | None) -> Tokenization | None:
    """How rows become tokens. Raises ValueError for a field or a value that is none."""
    if given is None or isinstance(given, Tokenization):
        return given
    made = Tokenization()
    fields = Tokenization.DESCRIPTOR.fields_by_name
    for name, value in given.items():
        field = fields.get(name)
        if field is None:
            near = difflib.get_close_matches(name, list(fields), n=1)
            raise ValueError(f"tokenization has no field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        setattr(made, name, value if field.enum_type is None else enums.number(field.enum_type, value))
    return made


def import_request(
    name: str,
    *,
    url: str,
    hub: str,
    config: str,
    split: str,
    revision: str,
    token_secret: str,
    sha256: str,
    reading: DatasetReading,
) -> ImportDatasetRequest:
    """Raises ValueError unless there is exactly one source, and for options that only the other one has."""
    if bool(url) == bool(hub):
        raise ValueError("an import has one source: give url or hub")
    request = ImportDatasetRequest(name=name, reading=reading, token_secret=token_secret, sha256=sha256)
    if hub:
        request.hub.CopyFrom(HubDataset(id=hub, config=config, split=split, revision=revision))
    elif config or split or revision:
        raise ValueError("config, split and revision are for datasets of the hub")
    else:
        request.url = url
    return request


def preview_request(
    dataset: str,
    *,
    base_model: str,
    base_model_revision: str,
    tokenization: TokenizationLike | None,
    max_length: int | None,
    count: int,
    lines: Sequence[int],
    hub_token_secret: str,
) -> PreviewDatasetRequest:
    return PreviewDatasetRequest(
        dataset=dataset,
        base_model=base_model,
        base_model_revision=base_model_revision,
        tokenization=tokenization_of(tokenization),
        max_length=max_length,
        count=count,
        lines=lines,
        hub_token_secret=hub_token_secret,
    )


def check_request(
    dataset: str,
    *,
    base_model: str,
    base_model_revision: str,
    tokenization: TokenizationLike | None,
    max_length: int | None,
    validation_dataset: str,
    hub_token_secret: str,
) -> CheckDatasetRequest:
    return CheckDatasetRequest(
        dataset=dataset,
        base_model=base_model,
        base_model_revision=base_model_revision,
        tokenization=tokenization_of(tokenization),
        max_length=max_length,
        validation_dataset=validation_dataset,
        hub_token_secret=hub_token_secret,
    )


def split_request(
    dataset: str, *, validation: float, seed: int, training_name: str, validation_name: str
) -> DeriveDatasetRequest:
    split = SplitDataset(
        dataset=dataset,
        validation=validation,
        seed=seed,
        training_name=training_name,
        validation_name=validation_name,
    )
    return DeriveDatasetRequest(split=split)


def sample_request(dataset: str, *, rows: int, seed: int, name: str) -> DeriveDatasetRequest:
    return DeriveDatasetRequest(sample=SampleDataset(dataset=dataset, rows=rows, seed=seed, name=name))


def concatenate_request(datasets: Sequence[str], *, name: str) -> DeriveDatasetRequest:
    if isinstance(datasets, str):
        raise ValueError("concatenate takes a list of datasets, not one name")
    return DeriveDatasetRequest(concatenate=ConcatenateDatasets(datasets=datasets, name=name))
