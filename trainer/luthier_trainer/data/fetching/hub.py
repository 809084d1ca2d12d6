"""Datasets of the Hugging Face Hub, as files.

The repository's card may say much about how its files are read, and a stranger wrote it: only files of the repository
itself, at the commit that was resolved first, in formats that hold data and no code, are read. JSON and CSV are taken
as they are written: as tables, every tool call would get the arguments of all others, and `007` would become 7. Other
formats go through `datasets`, a batch at a time.
"""

import contextlib
import itertools
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from luthier_trainer.data.fetching import https, parts, tables
from luthier_trainer.data.fetching.address import Policy, origin
from luthier_trainer.data.fetching.fence import Fence
from luthier_trainer.data.fetching.hub_card import Repository, judge_card, leads_outside
from luthier_trainer.data.fetching.hub_errors import translated
from luthier_trainer.data.fetching.hub_rows import of_parquet, streamed
from luthier_trainer.data.fetching.output import Output, Sink
from luthier_trainer.data.fetching.reports import Reports
from luthier_trainer.data.fetching.request import FetchError, HubSource, Request, too_large

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ENDPOINT = "https://huggingface.co"
MEMORY_LIMIT = 8 << 30
_UNREAD = (".bz2", ".xz")  # compressions that datasets are not read in
_MODULES = ("json", "parquet", "csv", "arrow", "text", "imagefolder")


def fetch(source: HubSource, request: Request, output: Output, cache: Path, token: str, reports: Reports) -> str:
    """Writes the rows of a split; returns its source, with the commit. cache: an empty folder that the caller removes.
    Raises FetchError. Changes this process for good (its environment, its working directory, how it connects)."""
    endpoint = _endpoint()
    own = (str(origin(endpoint)),) if os.environ.get("HF_ENDPOINT") else ()
    policy = Policy((*request.hosts, *own), request.networks)
    policy.admit(origin(endpoint))
    _prepare(cache)
    fence = Fence(policy)
    fence.close()
    try:
        return _fetch(source, endpoint, policy, output, cache, token, reports)
    except FetchError as error:
        raise (fence.refusal or error) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        if fence.refusal is not None:
            raise fence.refusal from error
        meaning = translated(error, source, endpoint, bool(token))
        if meaning is None:
            raise
        raise meaning from error


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def _prepare(cache: Path) -> None:
    """Settles what the libraries read when they are loaded: caches below one folder, no token but ours, no connections
    but Python's, no other libraries."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        os.environ.pop(name, None)
    os.environ |= {
        "HF_HOME": str(cache / "home"),
        "HF_XET_CACHE": str(cache / "home" / "xet"),
        "HF_MODULES_CACHE": str(cache / "home" / "modules"),
        "HF_TOKEN_PATH": str(cache / "home" / "token"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": str(int(https.STALL_SECONDS)),
        "HF_HUB_ETAG_TIMEOUT": str(int(https.CONNECT_SECONDS)),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "USE_TORCH": "0",
        "USE_TF": "0",
        "USE_JAX": "0",
        "TMPDIR": str(cache),
    }
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))  # a small file may hold a large table
    (cache / "empty").mkdir()
    os.chdir(cache / "empty")  # nothing here can be taken for a dataset
    import datasets

    datasets.config.USE_PARQUET_EXPORT = False  # what another server says about the rows is not needed
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = https.MAX_RESUMES
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 2
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 5


def _fetch(
    source: HubSource, endpoint: str, policy: Policy, output: Output, cache: Path, token: str, reports: Reports
) -> str:
    import datasets
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token or False, library_name="luthier")
    info = api.dataset_info(source.id, revision=source.revision or None, timeout=https.STALL_SECONDS)
    repository = Repository(info.id, str(info.sha))
    judge_card(api, repository)
    builder = datasets.load_dataset_builder(
        f"hf://datasets/{repository.id}", source.config or None, revision=repository.commit, token=token or False
    )
    module = type(builder).__module__.split(".")[2]
    if module not in _MODULES:
        message = f"The files of {repository.id} are read by `{module}`, which Luthier does not."
        raise FetchError("NOT_SUPPORTED", message, f"It reads {', '.join(_MODULES)}.")
    files = {str(split): list(names) for split, names in builder.config.data_files.items()}
    split = _split(source, files)
    if outside := [name for name in files[split] if not name.removeprefix("zip://").startswith(repository.prefix)]:
        raise leads_outside(repository.id, outside[0])
    if module in ("json", "csv", "parquet") and _is_plain(builder.config):
        download = _Download(api, repository, files[split], policy, cache, token, reports)
        if module == "parquet":
            shards = (of_parquet(part, repository, token) for _, part in download.parts(output.max_bytes))
            tables.write(itertools.chain.from_iterable(shards), output, lambda _: None)
        else:
            _copy(download, output, has_header=module == "csv")
    else:
        total = _total(builder.info.splits, split)
        rows = streamed(builder.as_streaming_dataset(split), repository, token)
        tables.write(rows, output, lambda count: reports.progress(count, total, "rows"))
    config = builder.config.name
    return f"hf://datasets/{repository.id}@{repository.commit}?{urlencode({'config': config, 'split': split})}"


def _split(source: HubSource, files: Mapping[str, list[str]]) -> str:
    split = source.split or "train"
    if split not in files:
        has = f"{source.id} has no split {split!r}" + (f" in {source.config!r}" if source.config else "")
        raise FetchError("NOT_FOUND", f"{has}. It has: {', '.join(sorted(files))}.", "Name one of its splits.")
    return split


def _is_plain(config: Any) -> bool:
    """Whether the card leaves it to the reader how the files are read, so that Luthier's own may do it."""
    told = ("name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter")
    given, usual = vars(config), vars(type(config)())
    return given.get("sep", ",") in (",", ";", "\t") and all(
        given[key] == usual[key] for key in usual if key not in told
    )


def _total(splits: Any, split: str) -> int:
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        return int(splits[split].num_examples)
    return 0


def _copy(download: "_Download", output: Output, has_header: bool) -> None:
    """Takes files of JSON or CSV as they are: one as it stands, several with their rows one after the other."""
    if len(download.paths) == 1 and not download.paths[0].lower().endswith(_UNREAD):
        if download.total > output.max_bytes:
            raise too_large(output.max_bytes)
        download.into(output, download.paths[0])
        return
    joint = parts.Joint(output, has_header)
    for path, part in download.parts(output.max_bytes):
        joint.append(part, path)


class _Download:
    """Files of a repository, got by our own means: pinned, resumed, bounded. paths: within the repository; total: their
    bytes."""

    def __init__(
        self, api: "HfApi", repository: Repository, names: list[str], policy: Policy, cache: Path, token: str,
        reports: Reports,
    ) -> None:  # fmt: skip
        self.paths = [name.removeprefix(repository.prefix) for name in names]
        found = api.get_paths_info(repository.id, self.paths, repo_type="dataset", revision=repository.commit)
        self.total: int = sum(getattr(each, "size", 0) for each in found)
        self._address = f"{api.endpoint}/datasets/{repository.id}/resolve/{repository.commit}/"
        self._policy = policy
        self._part = cache / "part"
        self._token = token
        self._reports = reports
        self._done = 0

    def into(self, sink: Sink, path: str) -> None:
        """Fills the sink with a file."""

        def progress(completed: int, _: int, unit: str) -> None:
            self._reports.progress(self._done + completed, self.total, unit)

        https.fetch(self._address + quote(path), self._policy, sink, progress, self._token)
        self._done += sink.size

    def parts(self, max_bytes: int) -> Iterator[tuple[str, Path]]:
        """Yields each path with the file, one after the other: a file is gone when the next one comes."""
        for path in self.paths:
            with Output(self._part, max_bytes) as file:
                self.into(file, path)
            yield path, self._part
            self._part.unlink()
