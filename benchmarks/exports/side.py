"""One merge in a process of its own.

    python -m benchmarks.exports.side luthier|peft SUBJECT WARM_UP OUT SHARD_BYTES

Prints seconds, processor seconds and the most memory that was resident beyond what the process had before, after it had
merged the small model of the warm-up: libraries are loaded then. Pages of mapped files count.
"""

import json
import re
import sys
import time
import warnings
from pathlib import Path


def luthier(subject: Path, out: Path, shard_bytes: int) -> None:
    """A weight at a time, in 32 bits, rounded once."""
    from luthier.v1.export_task_pb2 import WEIGHT_TYPE_BF16, MergedExport
    from luthier_trainer.export.merged import write_merged
    from luthier_trainer.export.source import Tuned
    from luthier_trainer.stop import never

    adapter = subject / "adapter"
    options = MergedExport(weights=WEIGHT_TYPE_BF16, max_shard_bytes=shard_bytes)
    out.mkdir()
    write_merged(Tuned(adapter, subject / "base", adapter, "model"), options, out, lambda _done, _total: None, never)


def peft(subject: Path, out: Path, shard_bytes: int) -> None:
    """What PEFT's documentation says: the model in memory, merged in its own precision."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(subject / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, str(subject / "adapter")).merge_and_unload()
    merged.save_pretrained(out, max_shard_size=shard_bytes)
    AutoTokenizer.from_pretrained(subject / "adapter").save_pretrained(out)


def resident(field: str) -> int:
    """Bytes, of `VmRSS` now or of `VmHWM` at the most."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    warnings.simplefilter("ignore")
    merge = {"luthier": luthier, "peft": peft}[sys.argv[1]]
    subject, warm_up, out, shard_bytes = Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
    merge(warm_up, out.with_name(out.name + "-warm-up"), shard_bytes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    merge(subject, out, shard_bytes)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    print(json.dumps({"seconds": seconds, "processor": processor, "peak_bytes": resident("VmHWM") - before}))


if __name__ == "__main__":
    main()
