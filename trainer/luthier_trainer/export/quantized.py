"""The merged model in 4 bits a weight, bitsandbytes' NF4 (Dettmers et al. 2023, arXiv 2305.14314)."""

import importlib.util
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from luthier.v1 import export_task_pb2
from luthier_trainer.errors import TrainingError
from luthier_trainer.export.merged import MAX_SHARD_BYTES, write_merged
from luthier_trainer.export.source import Tuned
from luthier_trainer.export.stored import Progress
from luthier_trainer.export.surroundings import GENERATION, write_tokenizer
from luthier_trainer.model import no_progress_bar
from luthier_trainer.stop import Check

_SHARD_BYTES = 500_000_000
"""Of the files in 16 bits that are quantised: bitsandbytes reads them a tensor at a time."""


def write_nf4(
    tuned: Tuned, options: export_task_pb2.MergedExport, folder: Path, progress: Progress, check: Check
) -> None:
    """Writes the merged model as transformers loads it with bitsandbytes. It is merged in bfloat16 into a directory of
    its own first, so that the disk must hold both; all of the 4-bit model is in memory while it is written.

    Raises TrainingError QUANTIZATION_UNAVAILABLE without bitsandbytes, else as `write_merged`.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "QUANTIZATION_UNAVAILABLE",
            "An export in nf4 needs bitsandbytes, which is not installed beside the trainer.",
            "Install it there (pip install bitsandbytes), or export in bf16.",
        )
    with tempfile.TemporaryDirectory(prefix=".wide-", dir=folder) as wide:
        merged = export_task_pb2.MergedExport(
            weights=export_task_pb2.WEIGHT_TYPE_BF16,
            max_shard_bytes=min(_SHARD_BYTES, options.max_shard_bytes or _SHARD_BYTES),
        )
        write_merged(tuned, merged, Path(wide), progress, check)
        check()
        _quantise(Path(wide), options.max_shard_bytes or MAX_SHARD_BYTES, folder)
        (folder / GENERATION).write_bytes((Path(wide) / GENERATION).read_bytes())
    write_tokenizer(tuned, folder)


def _quantise(wide: Path, limit: int, folder: Path) -> None:
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            wide,
            dtype=torch.bfloat16,
            device_map={"": "cpu"},
            quantization_config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        model.save_pretrained(folder, max_shard_size=limit)
