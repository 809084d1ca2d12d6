"""The trainer of Luthier. Importing it loads no torch: what needs torch is loaded when it is first asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier_trainer.local import FineTuned, fine_tune

__all__ = ["FineTuned", "fine_tune"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("luthier_trainer.local"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
