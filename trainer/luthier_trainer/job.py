"""Everything one job trains with, put together. Nothing here is shared: state is per job, never per model or
process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from luthier.trainer.v1.task_pb2 import BaseModelSource, DatasetSource, TrainerTask
from luthier.v1 import event_pb2, job_pb2, tokenization_pb2
from luthier_trainer import checkpoint, durable, memory, rope, speedups
from luthier_trainer.batches import Batches
from luthier_trainer.config import Places, Settings
from luthier_trainer.data.masks.render import prompt_ids
from luthier_trainer.data.tokens import streamed, tokenised
from luthier_trainer.data.tokens.parts import Part, parts, require_scores
from luthier_trainer.data.tokens.streamed import Rows
from luthier_trainer.data.tokens.task import tokens_for
from luthier_trainer.data.tokens.tokenised import TokenisedRows
from luthier_trainer.errors import TrainingError
from luthier_trainer.flops import Operations, operations
from luthier_trainer.forward import Forward
from luthier_trainer.gauges import peak_flops
from luthier_trainer.masters import Masters
from luthier_trainer.memory import Gauge, MemoryPlan
from luthier_trainer.model import Trained, adapter_rank, load_base, prepare
from luthier_trainer.neftune import Neftune
from luthier_trainer.optimizer import Optimizer
from luthier_trainer.order import RowOrder
from luthier_trainer.plan import Compute, attention_name, choose_blocks, choose_compute, most_tokens
from luthier_trainer.probe import choose_forward
from luthier_trainer.quantization import quantization_config
from luthier_trainer.report import Reporter
from luthier_trainer.schedule import warmup_steps
from luthier_trainer.state import Counters, ResumedPlan, State, read_state
from luthier_trainer.stop import Check
from luthier_trainer.throughput import Throughput


@dataclass
class Job:
    """The parts of a job. `counters`, `batches` (its budget shrinks when memory runs out) and `saved` change; the rest
    is decided once. `saved` names the newest checkpoint's step and directory; step 0 needs none. `resumed` is what the
    checkpoint said that was taken up. Of the steps up to `told` everything was reported, -1 for nothing at all, and
    those of `left_out` are made without an update: see `divergence`. `untold` is the newest step's report when
    `log_every` kept it back; `holds` is the step of the weights once the best ones were taken, None for those of
    the last step; `found_rate` the learning rate that a range test found, None without one."""

    task: TrainerTask
    settings: Settings
    places: Places
    reporter: Reporter
    compute: Compute
    tokenizer: PreTrainedTokenizerBase
    trained: Trained
    masters: Masters
    optimizer: Optimizer
    forward: Forward
    neftune: Neftune
    generation_attention: str
    sample_ids: Sequence[Sequence[int]]
    rows: Rows
    order: RowOrder
    evaluated: Part[Rows] | None
    total_steps: int
    warmup: int
    batches: Batches
    memory: MemoryPlan
    gauge: Gauge
    throughput: Throughput
    operations: Operations | None
    peak_flops: float
    notes: list[str]
    counters: Counters
    saved: tuple[int, str]
    resumed: State | None
    told: int = -1
    untold: event_pb2.StepCompleted | None = None
    holds: int | None = None
    left_out: frozenset[int] = frozenset()
    found_rate: float | None = None

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the current one."""
        return self.counters.step / self.order.steps_per_epoch

    @property
    def peak_rate(self) -> float:
        """The peak learning rate that the job trains with."""
        return self.settings.peak_rate if self.found_rate is None else self.found_rate

    def complete_rows(self) -> None:
        """Waits until all rows are tokenised and judged: nothing comes out of a job before. Raises TrainingError for
        rows that cannot be trained, and StopRequested."""
        self.rows.complete()
        if self.evaluated is not None:
            self.evaluated.rows.complete()

    def state(self) -> State:
        """What a checkpoint notes, but for the loss of the next batch."""
        rows = _identity(self.task, self.rows, self.order)
        return State(self.task.job_id, self.counters, self.resumed_plan(), rows, found_rate=self.found_rate)

    def resumed_plan(self) -> ResumedPlan:
        """What a continuation must share."""
        return ResumedPlan(
            device=str(self.compute.device),
            dtype=dtype_name(self.compute.dtype),
            attention=attention_name(self.forward, self.compute),
            micro_batch_tokens=self.batches.budget,
            threads=self.compute.threads,
            activation_checkpointing=self.memory.checkpointing,
        )

    def plan(self) -> event_pb2.PlanResolved:
        """The plan for people."""
        return event_pb2.PlanResolved(
            device=str(self.compute.device),
            dtype=dtype_name(self.compute.dtype),
            attention=attention_name(self.forward, self.compute),
            micro_batch_tokens=self.batches.budget,
            total_steps=self.total_steps,
            training_rows=len(self.order.rows),
            validation_rows=len(self.evaluated.indices) if self.evaluated else 0,
            base_parameters=self.trained.base_parameters,
            trained_parameters=self.trained.trained_parameters,
            target_modules=self.trained.target_modules,
            threads=self.compute.threads,
            truncated_rows=self.rows.truncated,
            notes=self.notes
            if self.found_rate is None
            else [*self.notes, f"learning rate {self.found_rate:g}, by a range test"],
            peak_flops=self.peak_flops,
            activation_checkpointing=self.memory.checkpointing,
            predicted_memory_bytes=self.memory.predicted_bytes,
            calibrated_memory_bytes=self.memory.calibrated_bytes,
            memory_limit_bytes=self.memory.limit_bytes,
        )


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def set_up(task: TrainerTask, settings: Settings, places: Places, reporter: Reporter, check: Check) -> Job:
    """Loads, tokenises, plans, and takes up a checkpoint that was verified. Raises TrainingError, and StopRequested
    between phases and while it tokenises."""
    durable.sweep(places.checkpoints)
    resumed = read_state(places.resume_from) if places.resume_from else None
    reporter.report(event_pb2.PhaseProgressed(phase=event_pb2.PHASE_LOADING, unit="models", total=1))
    tokens = tokens_for(task)
    tokenizer = tokens.tokenizer
    compute = choose_compute(task, settings.dtype, tokens.config, resumed.plan if resumed else None)

    streams = streamed.Streams()

    def load(dataset: DatasetSource) -> Rows:
        def accept(found: TokenisedRows) -> None:
            found.report.dataset_id, found.report.base_model = dataset.name, task.spec.fine_tune.base_model
            tokenised.require_trainable(found, reporter)

        wanted = streamed.Wanted(
            dataset,
            tokenizer,
            tokens.template,
            tokens.options,
            cache_dir=places.cache,
            cache_max_bytes=task.cache_max_bytes,
            reporter=reporter,
            check=check,
        )
        found = streams.load(wanted, accept)
        check()
        return found

    rows = load(task.training_dataset)
    training, evaluated = parts(task, rows, load)
    require_scores(training, evaluated)
    order = RowOrder(training.indices, settings.batch_size, settings.seed)
    sample_ids = [prompt_ids(tokenizer, tokens.template, each) for each in settings.sample_prompts]
    check()

    room = memory.limit(compute.device, task)
    memory.require_room_for_weights(task.base_model, room)
    ceiling = memory.ceiling(compute.device, task)
    gauge = memory.Gauge(compute.device)
    trained = _load_trained(task, settings, compute, places.resume_from)
    masters = Masters(trained.root, compute.dtype, cast_frozen=settings.lora is None)
    speedups.speed_up(trained.causal_lm)
    generation_attention = trained.causal_lm.config._attn_implementation
    forward, notes = choose_forward(trained.causal_lm, settings.attention, tokens.options.max_length)
    notes += choose_blocks(forward, compute, resumed.plan if resumed else None)
    forward = replace(forward, label_smoothing=settings.label_smoothing)
    optimizer = Optimizer(masters, settings.adam)
    reporter.report(event_pb2.PhaseProgressed(phase=event_pb2.PHASE_LOADING, unit="models", completed=1, total=1))
    check()

    total = total_steps(settings, order.steps_per_epoch)

    def planned_for_rows() -> tuple[memory.Rows, memory.MemoryPlan]:
        shape = memory.Rows(*rows.sizes, order, total, not forward.documents)
        plan = resumed.plan if resumed else None
        most = most_tokens(compute)
        return shape, memory.plan_memory(
            trained,
            settings,
            compute,
            forward,
            shape,
            limit=room,
            ceiling=ceiling,
            most=most,
            resumed=plan,
            cache_dir=places.cache,
        )

    try:
        shape, planned = planned_for_rows()
        is_small = planned.checkpointing or planned.budget_tokens < most_tokens(compute)
    except TrainingError:
        if rows.is_whole:
            raise
        is_small = True
    if is_small and not rows.is_whole:  # what is not tokenised yet was taken to be as long as it may be
        rows.complete()
        shape, planned = planned_for_rows()
    batches = Batches(
        forward.documents,
        planned.budget_tokens,
        tokenizer.pad_token_id or 0,
        compute.device,
        rope.borders(tokens.config.get_text_config(), tokens.options.max_length),
    )
    planned = memory.probed(planned, forward, masters, batches, shape, gauge, resumed=resumed is not None)
    job = Job(
        task=task,
        settings=settings,
        places=places,
        reporter=reporter,
        compute=compute,
        tokenizer=tokenizer,
        trained=trained,
        masters=masters,
        optimizer=optimizer,
        forward=forward,
        neftune=Neftune(trained.causal_lm, settings.neftune_alpha),
        generation_attention=generation_attention,
        sample_ids=sample_ids,
        rows=rows,
        order=order,
        evaluated=evaluated,
        total_steps=total,
        warmup=warmup_steps(total, settings.warmup_steps, settings.warmup_ratio),
        batches=replace(batches, budget=planned.budget_tokens),
        memory=planned,
        gauge=gauge,
        throughput=Throughput(),
        operations=operations(trained),
        peak_flops=peak_flops(compute.device, compute.dtype),
        notes=[*compute.notes, *notes, *_adapter_notes(task, settings, trained), *_row_notes(rows), *planned.notes],
        counters=resumed.counters if resumed else Counters(),
        saved=(resumed.counters.step, places.resume_from.name) if resumed and places.resume_from else (0, ""),
        resumed=resumed,
        found_rate=resumed.found_rate if resumed and settings.find_rate else None,
    )
    job.counters.computed_tokens = max(job.counters.computed_tokens, task.computed_tokens)
    if resumed and places.resume_from:
        identity = _identity(task, rows, order)
        if any(identity.get(name) != noted for name, noted in resumed.rows.items()):
            raise TrainingError(
                "CHECKPOINT_MISMATCH",
                f"The checkpoint {places.resume_from.name} was made with other rows or tokens than this task names.",
                "Start the job anew.",
            )
        optimizer.load(checkpoint.load_optimizer(places.resume_from))
    return job


def total_steps(settings: Settings, steps_per_epoch: int) -> int:
    """Optimizer steps in all: what the epochs give, rounded up as transformers does, and at most `max_steps`."""
    limits = []
    if settings.epochs is not None:
        limits.append(math.ceil(settings.epochs * steps_per_epoch))
    if settings.max_steps is not None:
        limits.append(settings.max_steps)
    return min(limits)


def _load_trained(task: TrainerTask, settings: Settings, compute: Compute, resume_from: Path | None) -> Trained:
    """The model with what is trained in it: a whole model comes from its checkpoint, and always in 32 bits."""
    source = task.base_model
    if settings.lora is None and resume_from is not None:
        source = BaseModelSource(location=str(resume_from))
    dtype = torch.float32 if settings.lora is None else compute.dtype
    adapter = settings.lora
    quantization = quantization_config(adapter.quantization, dtype, adapter.modules_to_save) if adapter else None
    base = load_base(source, dtype, compute.device, settings.attention, quantization)
    return prepare(
        base,
        source,
        settings.lora,
        name=task.spec.fine_tune.base_model,
        seed=settings.seed,
        resume_from=resume_from,
        last_layers=settings.train_last_layers,
    )


def _adapter_notes(task: TrainerTask, settings: Settings, trained: Trained) -> list[str]:
    notes = []
    if settings.lora is not None and settings.lora.quantization != job_pb2.LORA_QUANTIZATION_NONE:
        name = job_pb2.LoraQuantization.Name(settings.lora.quantization).removeprefix("LORA_QUANTIZATION_").lower()
        notes.append(f"the frozen linear weights are held in {name}")
    rank = adapter_rank(trained)
    if task.base_model.adapter_dir and settings.lora is not None and rank != settings.lora.rank:
        notes.append(f"the adapter that is continued keeps its own rank of {rank} and its own modules")
    return notes


def _row_notes(rows: Rows) -> list[str]:
    """What became of rows over the limit, where it is not that their end was cut off."""
    if not rows.is_whole:
        return ["training begins while the rows are tokenised: the log will tell what is over the limit"]
    statistics, overlong = rows.report.statistics, rows.report.tokenization.overlong
    if not statistics.overlong_rows or overlong == tokenization_pb2.OVERLONG_TRUNCATE:
        return []
    happened = "split" if overlong == tokenization_pb2.OVERLONG_SPLIT else "left out"
    return [
        f"{statistics.overlong_rows} rows over {rows.report.max_length} tokens were {happened}:"
        f" {statistics.lost_tokens} tokens are lost"
    ]


def _identity(task: TrainerTask, rows: Rows, order: RowOrder) -> dict[str, Any]:
    """What the order of the steps depends on."""
    return {
        "training_sha256": task.training_dataset.sha256,
        "template_sha256": rows.template_sha256,
        "training_rows": len(order.rows),
        "batch_size": order.batch_size,
        "seed": order.seed,
        "max_length": rows.report.max_length,
        "train_on": rows.report.tokenization.train_on,
        "response_template": rows.report.tokenization.response_template,
        "overlong": rows.report.tokenization.overlong,
    }
