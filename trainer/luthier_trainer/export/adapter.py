"""The adapter alone, as PEFT loads it."""

import shutil
from pathlib import Path

from transformers import AutoConfig

from luthier_trainer import durable
from luthier_trainer.export.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tuned, read_json
from luthier_trainer.export.stored import Progress, unsupported
from luthier_trainer.export.surroundings import write_generation_config, write_tokenizer
from luthier_trainer.export.tensor_file import TensorFile
from luthier_trainer.stop import Check


def write_adapter(tuned: Tuned, folder: Path, progress: Progress, check: Check) -> None:
    """Writes the adapter's weights as training left them, and a configuration that names the base as others know it.

    Raises TrainingError EXPORT_UNSUPPORTED after full fine-tuning, and MODEL_DAMAGED.
    """
    if tuned.adapter is None:
        raise unsupported(f"{tuned.name} has no adapter: every weight was trained", "Export it merged.")
    weights = tuned.adapter / ADAPTER_WEIGHTS
    size = weights.stat().st_size
    progress(0, size)
    TensorFile(weights).close()  # that it is whole
    check()
    shutil.copyfile(weights, folder / ADAPTER_WEIGHTS)
    config = read_json(tuned.adapter / ADAPTER_CONFIG)
    config["base_model_name_or_path"] = tuned.base_name
    config["revision"] = tuned.base_revision or None
    config["inference_mode"] = True
    durable.write_json(folder / ADAPTER_CONFIG, config)
    write_tokenizer(tuned, folder)
    # PEFT's `generate` stops where the base's settings say, and a base that was no chat model knows no end of a turn.
    base = AutoConfig.from_pretrained(tuned.base, trust_remote_code=False, local_files_only=True)
    write_generation_config(tuned, base, folder)
    progress(size, size)
