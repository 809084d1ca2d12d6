"""The peers: TRL's best settings on the pinned work, as `python -m benchmarks.choose_peer` found them, and Trainer's.

The search and its numbers are in results/peer-search.json. Every setting that came within about 10 % of the best is a
contender; a run's first round has them all, the best of each kind go on, and the fastest of those is the peer of that
run. Choose again when TRL, the work or the kind of machine changes.
"""

from benchmarks.engine.contestant import Contestant

# Tokens a CPU second in the first round: 623, 606, 593. Next: group_by_length with batch 1, 561, packing (bfd) at its
# best, 482, checkpointing at its best, 437.
FLOAT32 = (
    Contestant("trl", "float32", "group_by_length", 2),
    Contestant("trl", "float32", "group_by_length", 4),
    Contestant("trl", "float32", "default", 1),
)

# Weights loaded in bfloat16 under bf16=True: 1,195, 1,179 and 1,166 in the first round, 1,101 for the first in the
# final. 32-bit weights under bf16=True reached 1,064 there, bfloat16 weights alone 1,032; default with batch 1, 976.
BFLOAT16 = (
    Contestant("trl", "bfloat16-autocast", "group_by_length", 4),
    Contestant("trl", "bfloat16-autocast", "group_by_length", 8),
    Contestant("trl", "bfloat16-autocast", "group_by_length", 2),
    Contestant("trl", "autocast", "group_by_length", 8),
    Contestant("trl", "bfloat16", "group_by_length", 4),
)

FOR_INFORMATION = (Contestant("trl", "float32", "default", 8), Contestant("trl", "float32", "packing", 1))

# What its users would choose who know that padding costs: rows grouped by length, in bfloat16 where that is faster.
TRAINER_FLOAT32 = (Contestant("transformers", "float32", "group_by_length", 4),)
TRAINER_BFLOAT16 = (
    Contestant("transformers", "bfloat16-autocast", "group_by_length", 4),
    Contestant("transformers", "autocast", "group_by_length", 8),
)
