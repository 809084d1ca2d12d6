"""What the card of a dataset may say about its files: nothing that leads out of its repository."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_trainer.data.fetching.request import FetchError, shown_size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_CARD_BYTES = 8 << 20
MAX_PATHS = 10_000

_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
_OUTSIDE = re.compile(r"[/\\~]|[A-Za-z][\w+.-]*:|.*(?:::|://|\\)|(?:.*/)?\.\.(?:/|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Repository:
    """A dataset's repository at a commit."""

    id: str
    commit: str

    @property
    def prefix(self) -> str:
        """What the paths of all its files start with, as `datasets` writes them."""
        return f"hf://datasets/{self.id}@{self.commit}/"


def judge_card(api: "HfApi", repository: Repository) -> None:
    """Raises FetchError when the repository brings code, or when its card names files that are not its own."""
    from huggingface_hub import DatasetCard

    script = repository.id.rpartition("/")[2] + ".py"
    wanted = [*_CARDS, script]
    found = api.get_paths_info(repository.id, wanted, repo_type="dataset", revision=repository.commit)
    sizes = {each.path: each.size for each in found if hasattr(each, "size")}
    if script in sizes:
        message = f"{repository.id} brings code of its own to be read with, and Luthier never runs a dataset's code."
        raise FetchError(
            "NOT_SUPPORTED", message, "Import one of its files by URL, or the revision refs/convert/parquet."
        )
    if large := [path for path, size in sizes.items() if size > MAX_CARD_BYTES]:
        raise FetchError("TOO_LARGE", f"{large[0]} of {repository.id} is larger than {shown_size(MAX_CARD_BYTES)}.")
    configs: list[Any] = []
    for name in _CARDS[:2]:
        if name in sizes:
            path = api.hf_hub_download(repository.id, name, repo_type="dataset", revision=repository.commit)
            configs.append(_card_configs(Path(path), DatasetCard if name.endswith(".md") else None))
    for count, text in enumerate(_texts(configs)):
        if count == MAX_PATHS:
            raise FetchError("NOT_SUPPORTED", f"The card of {repository.id} names more than {MAX_PATHS} paths.")
        if is_outside(text):
            raise leads_outside(repository.id, text)


def _card_configs(path: Path, card: Any) -> Any:
    """What a card says about files: `data_files` and `data_dir` of each configuration."""
    import yaml

    data = card.load(path).data.to_dict() if card is not None else yaml.safe_load(path.read_text(encoding="utf-8"))
    configs = data.get("configs") if isinstance(data, Mapping) else None
    named = [each for each in configs if isinstance(each, Mapping)] if isinstance(configs, list) else []
    return [[each.get("data_files"), each.get("data_dir")] for each in named]


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """All texts in a value of YAML; whatever is nested deeper than a card needs, or not even a text, counts as an empty
    one, so that aliases of aliases come to an end."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)) and depth < 8:
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each, depth + 1)
    else:
        yield ""


def is_outside(path: str) -> bool:
    """Whether what a card names as a file, a pattern or a folder may be anything but one of the repository."""
    return _OUTSIDE.match(path) is not None


def leads_outside(name: str, path: str) -> FetchError:
    message = f"The card of {name} names {path[:100]!r}, which is not a file of its repository."
    return FetchError("NOT_SUPPORTED", message, "Import that file by URL.")
