"""GGUF files: a model, or its adapter, as llama.cpp and what is built on it load it, with an Ollama Modelfile.

The packages gguf and xllamacpp are the trainer's extra `gguf`; nothing here imports them before they are known to be
there.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from luthier.v1.export_task_pb2 import GgufExport
from luthier_trainer.export.source import Tuned
from luthier_trainer.stop import Check, never

_log = logging.getLogger(__name__)


def require(tuned: Tuned, options: GgufExport, llama_cpp_dir: str = "", check: Check = never) -> None:
    """That the model can be written so, before anything is. `llama_cpp_dir`: of a llama.cpp whose converter takes
    families that are not known here; empty for none.

    Raises TrainingError EXPORT_UNSUPPORTED: the extra is missing, another family or tokenizer, or an adapter that is
    no plain LoRA; MODEL_NOT_FOUND, MODEL_DAMAGED; and what `check` raises.
    """
    from luthier_trainer.export.gguf.library import require_packages

    require_packages()
    if options.adapter_only:
        from luthier_trainer.export.gguf.adapter import require_adapter

        require_adapter(tuned, options)
        return
    from luthier_trainer.export.gguf.external import is_foreign, require_external

    if llama_cpp_dir and is_foreign(tuned):
        require_external(Path(llama_cpp_dir), options)
        return
    from luthier_trainer.export.gguf.model import require_model

    require_model(tuned, check)


def write(
    tuned: Tuned,
    options: GgufExport,
    folder: Path,
    progress: Callable[[int, int], None],
    check: Check,
    llama_cpp_dir: str = "",
) -> None:
    """Writes one GGUF file and a Modelfile into `folder`; nothing before all that `require` asks for is known to hold.
    `progress` is told bytes that are done, and all of them.

    Raises as `require`, and TrainingError EXPORT_UNSUPPORTED for numbers that the type cannot hold.
    """
    from luthier_trainer.export.gguf.library import require_packages

    require_packages()
    if options.adapter_only:
        from luthier_trainer.export.gguf.adapter import write_adapter

        write_adapter(tuned, options, folder, progress, check)
        return
    from luthier_trainer.export.gguf.external import convert, is_foreign
    from luthier_trainer.export.gguf.model import write_model

    if llama_cpp_dir and is_foreign(tuned):
        convert(tuned, options, folder, Path(llama_cpp_dir), progress, check)
        return
    for note in write_model(tuned, options, folder, progress, check):
        _log.warning("%s", note)
