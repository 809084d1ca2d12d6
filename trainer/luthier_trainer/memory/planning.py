"""A job's memory: what it will take, the budget of tokens that follows, and the refusal of what cannot fit."""

import functools
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from luthier.trainer.v1.task_pb2 import BaseModelSource
from luthier_trainer.batches import Batches
from luthier_trainer.config import Settings
from luthier_trainer.errors import TrainingError
from luthier_trainer.forward import Forward
from luthier_trainer.masters import Masters
from luthier_trainer.memory.activations import can_checkpoint, checkpoint_layers
from luthier_trainer.memory.calibrate import calibrated
from luthier_trainer.memory.fit import Fit, fit
from luthier_trainer.memory.need import Need, need
from luthier_trainer.memory.resident import Gauge, follow_allocations
from luthier_trainer.memory.shape import Rows
from luthier_trainer.model import Trained
from luthier_trainer.plan import Compute
from luthier_trainer.state import ResumedPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryPlan:
    """How a job trains within memory. need: None where it could not be foretold, and then nothing was decided;
    calibrated_bytes: the peak after the probes, 0 without; limit_bytes: 0 when unknown."""

    budget_tokens: int
    checkpointing: bool
    need: Need | None = None
    predicted_bytes: int = 0
    calibrated_bytes: int = 0
    limit_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def is_tight(self) -> bool:
        """Whether probes are worth their time: more than half of the limit is foretold."""
        return self.need is not None and 0 < self.limit_bytes < 2 * self.predicted_bytes


_NARROWEST = 8
"""Times that weights of 32 bits are smaller when they are held in 4."""


def require_room_for_weights(source: BaseModelSource, limit: int) -> None:
    """Raises TrainingError OUT_OF_MEMORY for weights that are too large in any number format, so that reading them does
    not take the machine down; `plan_memory` tells exactly, once they are there. A limit of 0 is none."""
    if source.is_hub or limit <= 0:
        return
    least = sum(each.stat().st_size for each in Path(source.location).glob("*.safetensors")) // _NARROWEST
    if least > limit:
        raise _refused(least, limit)


def plan_memory(
    trained: Trained,
    settings: Settings,
    compute: Compute,
    forward: Forward,
    rows: Rows,
    *,
    limit: int,
    ceiling: int,
    most: int,
    resumed: ResumedPlan | None,
    cache_dir: Path | None = None,
) -> MemoryPlan:
    """Decides the budget and activation checkpointing, and switches the latter. A resumed plan's are kept.

    `limit`: bytes over the loaded process, of which the model is a part, 0 for none; `most`: tokens that a micro-batch
    should never exceed; `cache_dir`: where traces are remembered. Raises TrainingError OUT_OF_MEMORY when not even the
    longest row fits; another attempt may help where it would fit into `ceiling`, the device without other users.
    """
    kept = MemoryPlan(most, False)
    if resumed is not None:
        kept = MemoryPlan(resumed.micro_batch_tokens, resumed.activation_checkpointing)

    @functools.cache
    def need_of(checkpointing: bool) -> Need | None:
        if checkpointing and not can_checkpoint(trained.causal_lm):
            return None
        return need(
            trained,
            settings,
            compute,
            checkpointing=checkpointing,
            documents=forward.documents,
            fused_head=forward.fused_head,
            cache_dir=cache_dir,
        )

    try:
        found = kept if resumed is not None else _fitted(fit(need_of, rows.largest, limit, most), most, ceiling)
        taken = need_of(found.checkpointing)
        assert taken is not None
    except TrainingError:
        raise
    except Exception as error:  # a model whose ways depend on its tokens, or operations that no fake can do
        log.info("memory cannot be foretold: %s", error)
        checkpoint_layers(trained.causal_lm, kept.checkpointing)
        return replace(kept, limit_bytes=limit, notes=(*kept.notes, "what it takes of memory cannot be foretold"))
    largest = rows.largest(found.budget_tokens)
    checkpoint_layers(trained.causal_lm, found.checkpointing)
    peak = taken.peak(largest.tokens, largest.scored, largest.longest, largest.pairs)
    return replace(found, need=taken, predicted_bytes=peak, limit_bytes=limit)


def probed(
    planned: MemoryPlan,
    forward: Forward,
    masters: Masters,
    batches: Batches,
    rows: Rows,
    gauge: Gauge,
    *,
    resumed: bool,
) -> MemoryPlan:
    """The plan after two short probes, where it is tight: what they find is told, and the budget lowered when it says
    that this one does not fit after all. A resumed plan keeps its budget."""
    if planned.need is None or not planned.is_tight:
        return planned
    if batches.device.type == "cpu":
        follow_allocations()
    most = rows.largest(planned.budget_tokens)
    probes = replace(batches, budget=min(batches.budget, most.tokens))  # no probe is larger than what the job does
    gauge.note()
    try:
        found = calibrated(planned.need, forward, masters, probes, most.longest, gauge)
    except (RuntimeError, MemoryError) as error:
        log.info("the probes of memory failed: %s", error)  # a step that runs out of memory halves its budget by itself
        return planned

    def peak(budget: int) -> int:
        largest = rows.largest(budget)
        return found.peak(largest.tokens, largest.scored, largest.longest, largest.pairs)

    told = replace(planned, need=found, calibrated_bytes=peak(planned.budget_tokens))
    if resumed or told.calibrated_bytes <= planned.limit_bytes:
        return told
    lowered = fit(
        lambda checkpointing: found if checkpointing == planned.checkpointing else None,
        rows.largest,
        planned.limit_bytes,
        planned.budget_tokens,
    )
    if not lowered.fits:  # the probes may be wrong: what runs out of memory halves its budget by itself
        return told
    note = f"micro-batches have {lowered.budget_tokens} tokens in place of {planned.budget_tokens}: so the probes say"
    return replace(
        told,
        budget_tokens=lowered.budget_tokens,
        calibrated_bytes=peak(lowered.budget_tokens),
        notes=(*told.notes, note),
    )


def _fitted(found: Fit, most: int, ceiling: int) -> MemoryPlan:
    """Raises TrainingError OUT_OF_MEMORY when it does not fit."""
    if not found.fits:
        raise _refused(found.predicted_bytes, found.limit_bytes, found.predicted_bytes <= ceiling)
    notes = []
    if found.budget_tokens < most:
        notes.append(f"micro-batches have {found.budget_tokens} tokens in place of {most}: memory has no room for more")
    if found.checkpointing:
        notes.append("layers compute twice to save memory: without, the longest row would not fit")
    return MemoryPlan(found.budget_tokens, found.checkpointing, notes=tuple(notes))


def _refused(needed: int, limit: int, may_fit_later: bool = False) -> TrainingError:
    return TrainingError(
        "OUT_OF_MEMORY",
        f"Training would take at least {megabytes(needed)} of memory, and there are {megabytes(limit)}.",
        "Lower max_length, choose LoRA or bfloat16, or take a smaller base model.",
        retryable=may_fit_later,
    )


def megabytes(size: int) -> str:
    """For people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"
