"""What each point of the engine brings: how to switch it off from outside.

A piece is one entry of POINTS. The switch is a context manager that patches the engine while a pass runs; the engine
itself has no flags for this. `replaced` is all that most of them need; nothing of the trainer is imported before.
"""

import contextlib
import functools
import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

Switch = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Point:
    """number: that of the plan's list; key: names it on the command line and in results; engine, instead: what the
    engine does, and what stands in its place while `off` lasts; unavailable: why it cannot be measured here, empty when
    it can; asked_for: it takes so long that it is measured by its key alone."""

    number: int
    key: str
    engine: str
    instead: str
    off: Switch
    unavailable: Callable[[], str] = lambda: ""
    asked_for: bool = False


@contextlib.contextmanager
def replaced(where: str, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts `make(what is there)` stands for `name` of `where`: a module, or module:Class. Raises
    AttributeError when there is nothing of that name."""
    module, _, inside = where.partition(":")
    owner: Any = importlib.import_module(module)
    if inside:
        owner = getattr(owner, inside)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def switched_off(key: str) -> AbstractContextManager[None]:
    """Switches off the point of that key; nothing for an empty one."""
    if not key:
        return contextlib.nullcontext()
    return next(each for each in POINTS if each.key == key).off()


def _padded() -> AbstractContextManager[None]:
    return replaced(
        "luthier_trainer.probe", "_refuses_documents", lambda _: lambda *_args: "the benchmark switched it off"
    )


def _float32() -> AbstractContextManager[None]:
    return replaced("luthier_trainer.plan", "bfloat16_gain", lambda _: lambda *_args, **_named: 1.0)


def _changed(change: Callable[[Any], None]) -> AbstractContextManager[None]:
    """`change` gets each job's model when its set-up is over."""

    def make(set_up: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **named: Any) -> Any:
            job = set_up(*args, **named)
            change(job.forward.model)
            return job

        return changed

    return replaced("luthier_trainer.sft", "set_up", make)


def _checkpointing() -> AbstractContextManager[None]:
    return _changed(lambda model: model.activation_checkpointing_enable({"use_reentrant": False}))


def _full_logits() -> AbstractContextManager[None]:
    def loss_sum(self: Any, batch: Any) -> Any:
        """The model's own forward, its logits of all positions in 32 bits, then the loss of those that are scored."""
        import torch.nn.functional as F

        logits = self.model(**self._arguments(batch)).logits.float()
        scored = logits.reshape(-1, logits.shape[-1]).index_select(0, batch.scored)
        return F.cross_entropy(scored, batch.targets, reduction="sum")

    return replaced("luthier_trainer.forward:Forward", "loss_sum", lambda _: loss_sum)


def _cut(rows: int) -> AbstractContextManager[None]:
    def cut(examples: Any, _budget: int) -> Iterator[Any]:
        taken = list(examples)
        for start in range(0, len(taken), rows):
            yield taken[start : start + rows]

    return replaced("luthier_trainer.batches", "cut", lambda _: cut)


def _own_modules(faster: str) -> AbstractContextManager[None]:
    """The modules stay as they are that the `speed_up` of that module of the trainer would make faster."""
    return replaced(f"luthier_trainer.{faster}", "speed_up", lambda _: lambda _model: 0)


def _torchs_attention() -> AbstractContextManager[None]:
    return replaced("luthier_trainer.document_attention", "computes", lambda _: lambda *_args, **_named: False)


def _no_blocks() -> AbstractContextManager[None]:
    return replaced("luthier_trainer.plan", "blocks_gain", lambda _: lambda *_args, **_named: 0.0)


def _synchronised() -> AbstractContextManager[None]:
    def make(loss_sum: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*args: Any) -> Any:
            import torch

            loss = loss_sum(*args)
            loss.item()
            torch.cuda.synchronize()
            return loss

        return waiting

    return replaced("luthier_trainer.forward:Forward", "loss_sum", make)


def _no_cuda() -> str:
    import torch

    return "" if torch.cuda.is_available() else "only a CUDA device works apart from its host"


@functools.cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once a process, so that passes after the warm-up find it compiled."""
    import torch

    return torch.compile(forward, dynamic=True)


@contextlib.contextmanager
def _compiled_layers() -> Iterator[None]:
    changed: dict[type, Any] = {}

    def compile_layers(model: Any) -> None:
        layer = type(model.get_decoder().layers[0])
        if layer not in changed:
            changed[layer] = layer.forward
            layer.forward = _compiled(layer.forward)

    try:
        with _changed(compile_layers):
            yield
    finally:
        for layer, forward in changed.items():
            layer.forward = forward  # type: ignore[attr-defined]


def _no_compiler() -> str:
    return "" if shutil.which("g++") or shutil.which("clang++") else "there is no C++ compiler"


POINTS = (
    Point(1, "documents", "attention per document, nothing padded", "padded batches", _padded),
    Point(1, "own-attention", "one node for all documents", "causal SDPA for each", _torchs_attention),
    Point(1, "blocks", "middling documents in blocks of products", "torch's kernel for all", _no_blocks),
    Point(2, "dtype", "the number format that the probe chooses", "float32", _float32),
    Point(3, "no-checkpointing", "activations are kept", "activation checkpointing in each layer", _checkpointing),
    Point(4, "scored-rows", "loss in chunks of scored rows", "the model's own forward, full logits", _full_logits),
    Point(6, "token-budget", "micro-batches by tokens", "one example at a time", lambda: _cut(1)),
    Point(6, "token-budget-rows", "micro-batches by tokens", "4 examples at a time", lambda: _cut(4)),
    Point(7, "lora-product", "adapters in the frozen product's pass", "PEFT's layers", lambda: _own_modules("lora")),
    Point(7, "norms", "norms with one pass and little kept", "the model's", lambda: _own_modules("norms")),
    Point(7, "gated", "gate and up multiplied anew in backward", "the model's", lambda: _own_modules("gated")),
    Point(7, "rotary", "positions without copies", "the model's", lambda: _own_modules("rotary")),
    Point(8, "no-sync", "no host sync in a micro-step", "a sync after each", _synchronised, _no_cuda),
    Point(9, "no-compile", "layers as they are", "torch.compile of each layer", _compiled_layers, _no_compiler, True),
)
"""Point 5, the warm start, is no pass: `points_section` measures it through the server."""
