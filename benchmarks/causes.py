"""Why an aim is likely missed, found by profiling; told in the report next to the number."""

CAUSES: dict[str, str] = {
    "engine_float32": (
        "both sides spend most of their time in the same matrix products. Of Luthier's, three quarters is `aten::mm`, "
        "12 % attention, the rest element-wise; it reaches about three quarters of a large product's speed, and TRL's "
        "best, which since 1.16 computes its loss in chunks too, about 63 %. So 1.2 is most of what is left to win in "
        "float32. Attention on CPU (`scaled_dot_product_flash_attention`) runs at a third of a product's speed."
    ),
    "engine_auto": (
        "in bfloat16 the products are fast enough for the rest to show: 43 % is `aten::mm`, 35 % attention, whose CPU "
        "kernel gains nothing from bfloat16, the rest element-wise."
    ),
    "datasets_tokens": (
        "this run shared its two cores with a test run. Before it, on a quieter machine and an earlier build, Luthier "
        "made 2,411 rows/s, `map` 1,567 row by row and 2,598 by thousands. The tokenizer itself takes most of the time "
        "of all three; Luthier's rendering proves masks, counts roles and looks for what is wrong on top."
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
