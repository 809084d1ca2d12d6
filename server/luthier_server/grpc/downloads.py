"""Downloads: the whole list of files first, then their bytes, from any place on."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from luthier.v1 import models_pb2 as md
from luthier.v1.model_pb2 import ModelFile
from luthier_server.errors import InvalidArgument, NotFound, Violation
from luthier_server.exports import Exports
from luthier_server.files import File, Files, noted
from luthier_server.grpc.boundary import Context
from luthier_server.references import References

TENANT = "default"
_CHUNK = 256 * 1024


class DownloadService:
    """The part of luthier.v1.Models that sends files."""

    def __init__(self, references: References, exports: Exports, files: Files) -> None:
        self._references = references
        self._exports = exports
        self._files = files

    async def DownloadModel(
        self, request: md.DownloadModelRequest, context: Context
    ) -> AsyncIterator[md.DownloadModelResponse]:
        """Streams the files of a model, a checkpoint or an export."""
        async for response in _sent(request, await self._of(request.model_id)):
            yield response

    async def _of(self, name: str) -> list[File]:
        if name.startswith("export_"):
            export = await self._exports.get(TENANT, name)
            return noted(self._exports.directory(export.id), export.files)
        return await self._files.below((await self._references.find(TENANT, name)).directory)


async def _sent(request: md.DownloadModelRequest, files: Sequence[File]) -> AsyncIterator[md.DownloadModelResponse]:
    """Sends the manifest of these files, and their bytes from the request's position on.

    Raises InvalidArgument for a position that is in none of them, NotFound for a file that was deleted meanwhile.
    """
    start = _start(request, files)
    yield md.DownloadModelResponse(
        manifest=md.DownloadManifest(
            files=[ModelFile(path=each.name, size_bytes=each.size_bytes, sha256=each.sha256) for each in files]
        )
    )
    for index, each in enumerate(files[start:]):
        offset = 0 if index else request.from_offset
        try:
            with await asyncio.to_thread(open, each.path, "rb") as file:
                file.seek(offset)
                while data := await asyncio.to_thread(file.read, _CHUNK):
                    yield md.DownloadModelResponse(chunk=md.FileChunk(path=each.name, offset=offset, data=data))
                    offset += len(data)
        except FileNotFoundError as error:
            raise NotFound("file", each.name, "it was deleted meanwhile") from error


def _start(request: md.DownloadModelRequest, files: Sequence[File]) -> int:
    names = [each.name for each in files]
    if request.from_path and request.from_path not in names:
        raise _refused("from_path", f"is none of the {len(names)} files of {request.model_id}")
    start = names.index(request.from_path) if request.from_path else 0
    size = files[start].size_bytes if files else 0
    if request.from_offset > size:
        raise _refused("from_offset", f"lies beyond the file's {size} bytes")
    return start


def _refused(field: str, problem: str) -> InvalidArgument:
    return InvalidArgument(f"{field} {problem}", [Violation(field, problem)])
