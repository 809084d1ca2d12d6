"""One GGUF file in a process of its own.

    python -m benchmarks.exports.gguf_side luthier|cyllama SUBJECT WARM_UP TYPE THREADS

SUBJECT and WARM_UP are folders with `base` and, for cyllama, `f16.gguf`. Prints seconds, processor seconds and the most
memory that was resident beyond what the process had before, after it had written the small model of the warm-up. Pages
of mapped files count.
"""

import json
import shutil
import sys
import time
import warnings
from pathlib import Path

from benchmarks.exports.side import resident

FILE_TYPES = {"f16": 1, "q8_0": 7, "q2_k": 10, "q3_k_m": 12, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}


def luthier(subject: Path, kind: str, threads: int) -> None:
    """From the model's own files, a tensor at a time."""
    import torch

    from luthier.v1.export_task_pb2 import GgufExport, GgufType
    from luthier_trainer.export import gguf
    from luthier_trainer.export.source import Tuned
    from luthier_trainer.stop import never

    torch.set_num_threads(threads)
    out = subject / "luthier"
    out.mkdir()
    tuned = Tuned(subject / "base", subject / "base", None, "model")
    gguf.write(tuned, GgufExport(type=GgufType.Value(f"GGUF_TYPE_{kind.upper()}")), out, lambda *_: None, never)


def cyllama(subject: Path, kind: str, threads: int) -> None:
    """llama.cpp's quantisation of a file in 16 bits, which was made before."""
    import cyllama.llama.llama_cpp as llama_cpp

    options = llama_cpp.LlamaModelQuantizeParams()
    options.ftype, options.nthread = FILE_TYPES[kind], threads
    llama_cpp.model_quantize(str(subject / "f16.gguf"), str(subject / "cyllama.gguf"), options)


def main() -> None:
    warnings.simplefilter("ignore")
    write = {"luthier": luthier, "cyllama": cyllama}[sys.argv[1]]
    subject, warm_up, kind, threads = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
    write(warm_up, kind, threads)
    shutil.rmtree(warm_up / "luthier", ignore_errors=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    write(subject, kind, threads)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    print(json.dumps({"seconds": seconds, "processor": processor, "peak_bytes": resident("VmHWM") - before}))


if __name__ == "__main__":
    main()
