"""How a stop reaches the loop."""

from collections.abc import Callable

from luthier.trainer.v1.task_pb2 import CONTROL_ACTION_UNSPECIFIED
from luthier_trainer.control import Control


class StopRequested(Exception):
    """Somebody wants the trainer gone: save and leave."""


Check = Callable[[], None]
"""Raises StopRequested when a stop is wanted; called wherever training may be left."""


def never() -> None:
    """The check of work that nobody may stop."""


def check_of(control: Control) -> Check:
    """The check of a control."""

    def check() -> None:
        if control.requested() != CONTROL_ACTION_UNSPECIFIED:
            raise StopRequested

    return check
