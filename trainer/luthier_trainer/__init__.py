"""The trainer of Luthier. Importing it loads no torch: what needs torch is loaded when it is first asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier_trainer.local import FineTuned, fine_tune
    from luthier_trainer.local_export import Exported, export_model

__all__ = ["Exported", "FineTuned", "export_model", "fine_tune"]

_MODULES = {
    "FineTuned": "luthier_trainer.local",
    "fine_tune": "luthier_trainer.local",
    "Exported": "luthier_trainer.local_export",
    "export_model": "luthier_trainer.local_export",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
