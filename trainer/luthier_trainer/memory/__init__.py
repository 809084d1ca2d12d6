"""Memory: what training takes, foretold and measured, and what follows from it."""

from luthier_trainer.memory.fit import Fit, Largest, fit
from luthier_trainer.memory.host import host_need
from luthier_trainer.memory.limits import SHARE, ceiling, limit, total_memory
from luthier_trainer.memory.need import Need, need
from luthier_trainer.memory.planning import MemoryPlan, plan_memory, probed, require_room_for_weights
from luthier_trainer.memory.resident import Gauge
from luthier_trainer.memory.shape import Rows
from luthier_trainer.memory.skeleton import on_meta

__all__ = [
    "SHARE",
    "Fit",
    "Gauge",
    "Largest",
    "MemoryPlan",
    "Need",
    "Rows",
    "ceiling",
    "fit",
    "host_need",
    "limit",
    "need",
    "on_meta",
    "plan_memory",
    "probed",
    "require_room_for_weights",
    "total_memory",
]
