"""When transformers' Trainer, and what is made of it, begins and ends to train."""

from typing import Any, Protocol

from transformers import TrainerCallback


class Watch(Protocol):
    """What is told where the measured part starts, and after each of its steps."""

    def start(self) -> None: ...
    def lap(self) -> None: ...


class TrainerClock(TrainerCallback):
    """Times from where training begins to the end of its last step: set-up and the end do not count."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.steps = 0

    def on_train_begin(self, *args: Any, **inside: Any) -> None:
        self.watch.start()

    def on_step_end(self, *args: Any, **inside: Any) -> None:
        self.watch.lap()
        self.steps += 1
