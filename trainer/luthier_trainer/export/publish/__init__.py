"""Copies of an export at its destination: whole, verified and with a manifest, or without one.

`place` reads the destination, `credentials` the secret; `store`, `folder` and `hub` write the copy. Each writes the
manifest last, after every file was verified, and goes on with what an earlier attempt of the same export left.
"""

from collections.abc import Sequence
from pathlib import Path

from luthier.v1.export_task_pb2 import ExportDestination
from luthier.v1.model_pb2 import ModelFile
from luthier_trainer.export.publish import folder as folders
from luthier_trainer.export.publish import hub, store
from luthier_trainer.export.publish.contents import Meter, Progress, contents
from luthier_trainer.export.publish.place import Folder, Prefix, place
from luthier_trainer.stop import Check


def publish(
    folder: Path,
    files: Sequence[ModelFile],
    destination: ExportDestination,
    secret: str,
    roots: Sequence[str],
    progress: Progress,
    check: Check,
) -> str:
    """Copies an export; returns where the copy is, with the commit for a repository of the hub.

    folder: the export; files: what of it is copied, with sizes and hashes as they were proven; secret: what the secret
    named by the destination holds; roots: folders that `file://` may go below; progress: is told bytes that are done
    and all bytes; check: is called between parts. Raises TrainingError DESTINATION_FAILED or STORAGE_FULL, whose
    messages hold no part of the secret, and what check raises.
    """
    where = place(destination.uri)
    what = contents(folder, files)
    meter = Meter(what.size, progress)
    if isinstance(where, Folder):
        return folders.publish(where, what, roots, meter, check)
    name = destination.credentials_secret
    if isinstance(where, Prefix):
        return store.publish(where, what, secret, name, meter, check)
    return hub.publish(where, what, destination.public, secret, name, meter, check)
