"""Why an aim is likely missed, found by profiling; told in the report next to the number."""

CAUSES: dict[str, str] = {
    "engine_float32": (
        "both sides spend most of their time in the same matrix products, of which float32 leaves little to win: TRL "
        "computes its loss in chunks too since 1.16, and its best setting pads almost nothing."
    ),
    "engine_auto": (
        "in bfloat16 the products are fast enough for the rest to show: attention on a CPU and what is element-wise, "
        "which gain little from bfloat16 and which both sides have alike."
    ),
    "engine_wish": (
        "in bfloat16 the products are fast enough for the rest to show, which both sides have alike; the table of "
        "points tells what each part of the engine brings."
    ),
    "engine_utilisation": (
        "the roofline counts matrix products alone, at the speed of a large one; attention, norms, activations and the "
        "optimizer's step take their time beside them, and the model's own products are smaller."
    ),
    "datasets_tokens": (
        "the tokenizer itself takes most of the time of all three; Luthier's rendering proves masks, counts roles and "
        "looks for what is wrong on top, and reads the file within its time."
    ),
    "engine_memory": (
        "a micro-batch has up to 3,072 tokens, TRL's with two rows a few hundred; 2,048 would take less memory than "
        "TRL in any round, and 6 % more processor time."
    ),
    "job_latency_warm": (
        "the first job of a model's shape has its memory traced before the first step, and every job proves its faster "
        "modules and measures its attention: some tenths of a second each."
    ),
    "watch_live_p99": (
        "1,000 watchers that each get at most 20 messages a second are up to 20,000 writes a second, which with their "
        "reading take both cores; whatever else runs on the machine adds to the lag."
    ),
}
"""By the start of an aim's key."""


def cause(key: str) -> str:
    """What is known; empty when nothing is."""
    return next((text for start, text in CAUSES.items() if key.startswith(start)), "")
