"""A folder of rows and images as one zip archive, the same bytes each time."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")
# What datasets of the hub have beside their rows.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SHOWN = 5
_BLOCK = 1024 * 1024


def packed_folder(folder: Path) -> IO[bytes]:
    """A temporary file with the zip of a folder: its one file of rows, and its images.

    Raises OSError, and ValueError when there is not exactly one file of rows.
    """
    names = sorted(_files(folder))
    rows = [name for name in names if _is_rows(name)]
    if len(rows) != 1:
        found = ", ".join(rows[:_SHOWN]) + (", ..." if len(rows) > _SHOWN else "")
        told = f"there are {len(rows)}: {found}; leave one" if rows else f"there is none ({', '.join(_ROWS)})"
        raise ValueError(f"{folder} must hold exactly one file of rows, and {told}")
    return _packed([(name, folder / name) for name in names if name == rows[0] or _is_image(name)])


def packed_with_images(rows: Path, images: Path) -> IO[bytes]:
    """A temporary file with the zip of a file of rows and the images of a folder.

    Images are named as seen from the folder of the rows when they lie below it, else as seen from their own. Raises
    OSError, and ValueError when the folder has no images.
    """
    if not images.is_dir():
        raise NotADirectoryError(20, "Not a folder of images", str(images))
    home, inside = rows.resolve().parent, images.resolve()
    before = inside.relative_to(home).as_posix() + "/" if inside != home and inside.is_relative_to(home) else ""
    found = [(before + name, images / name) for name in sorted(_files(images)) if _is_image(name)]
    if not found:
        raise ValueError(f"{images} holds no images ({', '.join(_IMAGES)})")
    return _packed(sorted([*found, (rows.name, rows)]))


def _files(folder: Path) -> Iterator[str]:
    """The regular files below a folder by their path in it. Hidden ones are left out, and links that lead outside."""
    root = folder.resolve(strict=True)
    for here, directories, files in os.walk(root):
        directories[:] = [each for each in directories if not each.startswith(".")]
        for file in files:
            path = Path(here, file)
            if not file.startswith(".") and path.is_file() and path.resolve().is_relative_to(root):
                yield path.relative_to(root).as_posix()


def _is_rows(name: str) -> bool:
    lower = name.lower()
    if lower.rpartition("/")[2] in _NO_ROWS:
        return False
    for ending in _COMPRESSED:
        lower = lower.removesuffix(ending)
    return lower.endswith(_ROWS)


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGES)


def _packed(members: list[tuple[str, Path]]) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, path in members:
                # Times, owners and the system it was made on would give the same content another hash.
                member = zipfile.ZipInfo(name, _EPOCH)
                member.create_system, member.external_attr = 3, 0o100644 << 16
                member.file_size = path.stat().st_size
                with open(path, "rb") as source, archive.open(member, "w") as target:
                    shutil.copyfileobj(source, target, _BLOCK)
    except BaseException:
        file.close()
        raise
    return file
