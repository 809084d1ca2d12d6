"""What a job takes beside memory, before it runs: its steps and tokens, its time, and its room on the disk."""

from dataclasses import dataclass

import numpy as np

from luthier_trainer.config import Settings
from luthier_trainer.data.tokens.counted import Counted
from luthier_trainer.flops import Operations
from luthier_trainer.job import total_steps
from luthier_trainer.model import Trained
from luthier_trainer.order import RowOrder, epoch_order, hold_out

USUAL_MFU = {"cpu": 0.5, "cuda": 0.35}
"""Share of the device's measured peak that training reaches, by kind of device: on CPUs what the benchmark of
docs/engine.md measured; on CUDA between what LoRA on an 8B Llama reaches on an H100 (41 %, NVIDIA's NeMo) and what
smaller models do. A model that is small for its device reaches less: an earlier job's share is the better guess."""

_READ_BYTES, _WRITE_BYTES = 500e6, 200e6
"""Bytes a second of a usual disk: weights are read, checkpoints are written, hashed and synced."""
_START_SECONDS = 0.5
"""From the fork of a warm trainer to the first byte of its model."""
_GENERATION_BYTES = {"cpu": 10e9, "cuda": 1e12}
"""Bytes of weights a second while text is generated, which is bound by reading all of them for each token."""
_FILES_BYTES = 16 * 1024
"""Configurations, states and manifests of a directory."""


@dataclass(frozen=True)
class Amount:
    """Tokens of some rows, as `Operations` needs them; of a sample, what is to be expected."""

    tokens: float
    scored: float
    pairs: float

    def operations(self, each: Operations) -> float:
        """What training on them takes."""
        return self.tokens * each.per_token + self.scored * each.per_scored + self.pairs * each.per_pair

    def forward(self, each: Operations, *, frozen: bool) -> float:
        """What evaluating them takes: of a frozen weight's products one in two, of a trained one's and of attention's
        one in three."""
        linear = self.tokens * each.per_token + self.scored * each.per_scored
        return linear / (2 if frozen else 3) + self.pairs * each.per_pair / 3

    def times(self, count: float) -> "Amount":
        """So often."""
        return Amount(self.tokens * count, self.scored * count, self.pairs * count)

    def plus(self, other: "Amount") -> "Amount":
        """Both."""
        return Amount(self.tokens + other.tokens, self.scored + other.scored, self.pairs + other.pairs)


@dataclass(frozen=True)
class Course:
    """How a job will go: rows, steps, and tokens of one pass, of the whole training and of one evaluation."""

    training_rows: int
    validation_rows: int
    total_steps: int
    evaluations: int
    checkpoints: int
    an_epoch: Amount
    training: Amount
    an_evaluation: Amount


def course(settings: Settings, training: Counted, validation: Counted | None) -> Course:
    """The course that `sft` takes, with the rows, order and steps that it has."""
    if validation is None:
        kept, held_out = hold_out(settings.seed, training.rows, settings.validation_fraction)
        evaluated, among = held_out, training
    else:
        kept = np.arange(training.rows, dtype=np.int64)
        evaluated, among = np.arange(validation.rows, dtype=np.int64), validation
    order = RowOrder(kept, settings.batch_size, settings.seed)
    total = total_steps(settings, order.steps_per_epoch)
    epochs, rest = divmod(total, order.steps_per_epoch)
    an_epoch = Amount(*training.sums(kept))
    last = kept[epoch_order(settings.seed, epochs, len(kept))[: rest * settings.batch_size]]
    every = settings.evaluate_every_steps or (settings.evaluate_every_epochs or 1) * order.steps_per_epoch
    saves = settings.checkpoint_every or max(50, -(-total // 10))
    return Course(
        training_rows=len(kept),
        validation_rows=len(evaluated),
        total_steps=total,
        # Before the first step, whenever one is due, and after the last.
        evaluations=1 + -(-total // every) if len(evaluated) else 0,
        checkpoints=total // saves,
        an_epoch=an_epoch,
        training=an_epoch.times(epochs).plus(Amount(*training.sums(last))),
        an_evaluation=Amount(*among.sums(evaluated)) if len(evaluated) else Amount(0, 0, 0),
    )


@dataclass(frozen=True)
class Sizes:
    """Bytes of a job's files: of its model, of one checkpoint, and of everything on the disk at its fullest."""

    model: int
    checkpoint: int
    disk: int


def sizes(settings: Settings, trained: Trained, tokenizer_bytes: int, course: Course, cache_bytes: int) -> Sizes:
    """What `checkpoint` and `save` write: trained weights in 32 bits (of full fine-tuning all of them), AdamW's two
    moments of each trained weight in 32 bits, and the tokenizer."""
    amount = trained.trained_parameters
    weights = 4 * (trained.base_parameters if settings.lora is None else amount)
    files = tokenizer_bytes + _FILES_BYTES
    model, checkpoint = weights + files, weights + 8 * amount + files
    # One more than are kept while the newest is written, and the best.
    held = min(course.checkpoints, settings.checkpoint_keep + 1) + (1 if settings.keep_best else 0)
    return Sizes(model, checkpoint, model + held * checkpoint + cache_bytes)


def seconds(
    settings: Settings,
    trained: Trained,
    course: Course,
    written: Sizes,
    operations: Operations,
    rate: float,
    device: str,
) -> float:
    """From the trainer's start to the model, at so many operations a second."""
    frozen = settings.lora is not None
    weights = trained.base_parameters * trained.causal_lm.dtype.itemsize
    computing = course.training.operations(operations) / rate
    computing += course.evaluations * course.an_evaluation.forward(operations, frozen=frozen) / rate
    prompts = len(settings.sample_prompts) * (course.evaluations if settings.sample_each_evaluation else 2)
    generating = prompts * settings.sample_max_tokens * weights / _GENERATION_BYTES[device]
    writing = (course.checkpoints * written.checkpoint + written.model) / _WRITE_BYTES
    return _START_SECONDS + weights / _READ_BYTES + computing + generating + writing
