"""The peer: TRL's best settings on the pinned work, as `python -m benchmarks.choose_peer` found them.

The search and its numbers are in results/peer-search.json. Where two settings were within a few percent of each other
both are pinned, and the faster one in a run is the peer of that run. Choose again when TRL, the work or the kind of
machine changes.
"""

from benchmarks.engine.contestant import Contestant

# Tokens a CPU second in the final, medians: 567 and 548 here. Next in the first round: default with batch 1, 593 where
# these two had 623 and 606; packing (bfd) at its best 482; checkpointing at its best 437.
FLOAT32 = (
    Contestant("trl", "float32", "group_by_length", 2),
    Contestant("trl", "float32", "group_by_length", 4),
)

# The best with 32-bit weights under bf16=True, 1,064 (default with batch 1: 976), and the best with weights loaded in
# bfloat16, which is under bf16=True too, 1,101 (without: 1,032).
BFLOAT16 = (
    Contestant("trl", "autocast", "group_by_length", 8),
    Contestant("trl", "bfloat16-autocast", "group_by_length", 4),
)

FOR_INFORMATION = (Contestant("trl", "float32", "default", 8), Contestant("trl", "float32", "packing", 1))
"""TRL as it comes (its default batch), and its packing: one pass each."""
