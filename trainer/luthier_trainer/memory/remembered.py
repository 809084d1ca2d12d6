"""What a model was traced to take, kept on disk: the next job of the same shape need not trace it again.

    CACHE_DIR/memory/KEY.json    the moments; KEY stands for the model's modules, sizes and settings, and for the code

Nothing here has to be there or right to be read: what does not read is traced anew.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

import luthier_trainer
from luthier_trainer.memory.terms import Terms

_FOLDER = "memory"
_MOST_ENTRIES = 256


def remembered(
    cache_dir: Path | None, model: nn.Module, others: Hashable, trace: Callable[[], tuple[Terms, ...]]
) -> tuple[Terms, ...]:
    """What `trace` returned for the same model, device and `others`, by this code; called where
    there is no `cache_dir`."""
    if cache_dir is None:
        return trace()
    path = cache_dir / _FOLDER / f"{_key(model, others)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = tuple(Terms(*map(float, each)) for each in json.loads(path.read_bytes()))
        os.utime(path)
        return found
    found = trace()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps([each.values for each in found]))
        aside.replace(path)
        for old in sorted(path.parent.iterdir(), key=lambda each: -each.stat().st_mtime)[_MOST_ENTRIES:]:
            old.unlink(missing_ok=True)
    return found


def _key(model: nn.Module, others: Hashable) -> str:
    tensors = [
        (name, tuple(each.shape), str(each.dtype), each.device.type) for name, each in model.state_dict().items()
    ]
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    faster = [name for name, each in model.named_modules() if "forward" in vars(each)]
    config = getattr(model, "config", None)
    settings = (str(config), getattr(config, "_attn_implementation", ""))
    parts = (repr(model), tensors, trained, faster, settings, others, _code())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _code() -> tuple[Hashable, ...]:
    """The versions that a trace depends on, and the state of this package's files."""
    folder = Path(luthier_trainer.__file__).parent
    files = sorted((str(each.relative_to(folder)), each.stat()) for each in folder.rglob("*.py"))
    own = tuple((name, found.st_mtime_ns, found.st_size) for name, found in files)
    return torch.__version__, transformers.__version__, peft.__version__, own
