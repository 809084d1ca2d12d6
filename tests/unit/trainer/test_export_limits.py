"""Limits of a proof follow from the type and from the model."""

import numpy as np
import pytest

from luthier.v1 import export_task_pb2
from luthier.v1.export_task_pb2 import ExportTask, GgufExport, MergedExport
from luthier_trainer.export.proof.artefact import Floats
from luthier_trainer.export.proof.measure import CANDIDATES, Judged, Standing, agreement, judged, standing
from luthier_trainer.export.proof.thresholds import Limits, limits_of, thresholds_of

F16 = ExportTask(merged=MergedExport(weights=export_task_pb2.WEIGHT_TYPE_F16))
Q4_K_M = ExportTask(gguf=GgufExport(type=export_task_pb2.GGUF_TYPE_Q4_K_M))
VOCABULARY = 200


def _model(seed: int, sure: float, positions: int = 40) -> Floats:
    """Logits whose likeliest token, at each position the position's own number, stands out by `sure`."""
    logits = np.random.default_rng(seed).normal(size=(positions, VOCABULARY)).astype(np.float32)
    logits[np.arange(positions), np.arange(positions)] += sure
    return logits


def _limits(export: ExportTask, logits: Floats, noise: float) -> tuple[Limits, Standing, Judged]:
    targets = list(range(len(logits)))
    own = standing(logits, targets)
    shaken = judged(logits + np.float32(noise) * _model(9, 0.0, len(logits)), targets, own)
    return limits_of(thresholds_of(export), own, shaken, VOCABULARY), own, shaken


def test_a_model_that_makes_much_of_rounding_is_allowed_more() -> None:
    calm, own, _ = _limits(F16, _model(1, 8.0), 0.0)
    wild, _, _ = _limits(F16, _model(1, 8.0), 0.1)
    assert calm.logprob == pytest.approx(1e-2 * float(own.spread.mean()))
    assert wild.logprob is not None and calm.logprob is not None and wild.logprob > 10 * calm.logprob
    assert calm.perplexity == 1.005


def test_noise_excuses_a_quantised_model_only_where_it_knows_nothing() -> None:
    knows, _, _ = _limits(Q4_K_M, _model(1, 12.0), 1.0)
    guesses, _, _ = _limits(Q4_K_M, _model(1, -1.0), 1.0)
    assert (knows.top1, knows.perplexity) == (0.92, 1.15)
    assert guesses.top1 < 0.5 and guesses.perplexity > 1.15


def test_of_few_positions_one_may_differ() -> None:
    few, _, _ = _limits(Q4_K_M, _model(1, 12.0, positions=4), 0.0)
    assert few.top1 == 0.75


def test_a_token_that_is_not_among_the_likeliest_is_never_tied() -> None:
    flat = np.zeros((1, VOCABULARY), np.float32)
    flat[0, 0] = 1e-3
    own = standing(flat, [0])
    assert own.ids[0].tolist() == list(range(CANDIDATES))
    for token, expected in ((1, True), (VOCABULARY - 1, False)):
        other = flat.copy()
        other[0, token] = 1.0
        same, tied = agreement(own, judged(other, [0], own), np.full(1, 10.0, np.float32))
        assert (same.tolist(), tied.tolist()) == ([False], [expected])


def test_a_vocabulary_smaller_than_what_is_kept_counts_no_token_twice() -> None:
    few = np.arange(5, dtype=np.float32)[None]
    own = standing(few, [4])
    same, tied = agreement(own, judged(few, [4], own), np.zeros(1, np.float32))
    assert own.ids[0, :5].tolist() == [4, 3, 2, 1, 0]
    assert same.all() and not tied.any()
