"""The client of Luthier: AsyncClient, Client, and the command `luthier`.

Names are loaded when they are first used, so that `luthier --help` does not wait for grpc.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier_client import exports
    from luthier_client.async_client import AsyncClient
    from luthier_client.client import Client
    from luthier_client.connection import ServerInfo
    from luthier_client.errors import (
        InvalidDataset,
        InvalidSpec,
        JobCancelled,
        JobFailed,
        LuthierError,
        NotFound,
        SequenceGap,
        TlsFailed,
        Unauthenticated,
        Unavailable,
    )
    from luthier_client.handle import AsyncJobHandle, JobHandle
    from luthier_client.metrics import Metrics, fold
    from luthier_client.spec import load_spec
    from luthier_client.watch import WatchOptions

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncJobHandle",
    "Client",
    "InvalidDataset",
    "InvalidSpec",
    "JobCancelled",
    "JobFailed",
    "JobHandle",
    "LuthierError",
    "Metrics",
    "NotFound",
    "SequenceGap",
    "ServerInfo",
    "TlsFailed",
    "Unauthenticated",
    "Unavailable",
    "WatchOptions",
    "__version__",
    "exports",
    "fold",
    "load_spec",
]

_MODULES = {
    "async_client": ("AsyncClient",),
    "client": ("Client",),
    "connection": ("ServerInfo",),
    "errors": (
        "InvalidDataset",
        "InvalidSpec",
        "JobCancelled",
        "JobFailed",
        "LuthierError",
        "NotFound",
        "SequenceGap",
        "TlsFailed",
        "Unauthenticated",
        "Unavailable",
    ),
    "handle": ("AsyncJobHandle", "JobHandle"),
    "metrics": ("Metrics", "fold"),
    "spec": ("load_spec",),
    "watch": ("WatchOptions",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "exports":
        return import_module(f"{__name__}.exports")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
