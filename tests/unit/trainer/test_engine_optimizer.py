"""The optimizer, clipping and schedules are torch's and transformers' own."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.optimization import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from luthier.v1 import job_pb2
from luthier_trainer.masters import Masters
from luthier_trainer.optimizer import AdamSettings, Optimizer
from luthier_trainer.schedule import decay_steps, learning_rate, warmup_steps

SETTINGS = AdamSettings(beta1=0.9, beta2=0.95, epsilon=1e-6, weight_decay=0.1, max_grad_norm=0.5)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        (job_pb2.LR_SCHEDULER_COSINE, "cosine"),
        (job_pb2.LR_SCHEDULER_LINEAR, "linear"),
        (job_pb2.LR_SCHEDULER_CONSTANT, "constant_with_warmup"),
    ],
)
@pytest.mark.parametrize(("warmup", "total"), [(0, 20), (5, 20), (20, 20), (1, 1), (30, 20)])
def test_rates_equal_those_of_transformers(
    shape: job_pb2.LrScheduler.ValueType, name: str, warmup: int, total: int
) -> None:
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(name, adam, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        found = learning_rate(3e-4, shape, step, warmup=warmup, total_steps=total)
        assert found == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        adam.step()
        scheduler.step()


@pytest.mark.parametrize(("warmup", "total"), [(0, 20), (5, 20), (1, 2), (30, 20)])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_floors_equal_those_of_transformers(warmup: int, total: int, floor: float) -> None:
    def expected(make: Callable[..., LRScheduler], **settings: float) -> list[float]:
        adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
        scheduler = make(adam, num_warmup_steps=warmup, num_training_steps=total, **settings)
        rates: list[float] = []
        for _ in range(total):
            rates += map(float, scheduler.get_last_lr())
            adam.step()
            scheduler.step()
        return rates

    def found(shape: job_pb2.LrScheduler.ValueType) -> list[float]:
        return [
            learning_rate(3e-4, shape, step, warmup=warmup, total_steps=total, floor=floor) for step in range(total)
        ]

    cosine = expected(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=floor)
    assert found(job_pb2.LR_SCHEDULER_COSINE) == pytest.approx(cosine, rel=1e-12, abs=1e-18)
    linear = expected(get_polynomial_decay_schedule_with_warmup, lr_end=3e-4 * floor, power=1.0)
    assert found(job_pb2.LR_SCHEDULER_LINEAR) == pytest.approx(linear, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    ("warmup", "decay", "total"), [(0, 4, 20), (5, 2, 20), (0, 20, 20), (15, 10, 20), (3, 0, 5), (30, 2, 20)]
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_warmup_stable_decay_equals_that_of_transformers(warmup: int, decay: int, total: int, floor: float) -> None:
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_wsd_schedule(
        adam,
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_training_steps=total,
        decay_type="linear",
        min_lr_ratio=floor,
    )
    shape = job_pb2.LR_SCHEDULER_WARMUP_STABLE_DECAY
    for step in range(total):
        found = learning_rate(3e-4, shape, step, warmup=warmup, total_steps=total, decay=decay, floor=floor)
        assert found == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        adam.step()
        scheduler.step()


def test_the_decay_is_a_share_rounded_up() -> None:
    assert [decay_steps(total, 0.1) for total in (1, 10, 11, 100)] == [1, 1, 2, 10]


def test_warmup_is_the_steps_given_or_a_share_rounded_up() -> None:
    assert warmup_steps(100, None, 0.03) == 3
    assert warmup_steps(101, None, 0.03) == 4
    assert warmup_steps(100, 7, None) == 7
    assert warmup_steps(100, 0, None) == 0
    assert warmup_steps(100, None, None) == 0


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_steps_equal_torchs_adamw_with_clipping_and_no_decay_on_vectors(max_norm: float) -> None:
    ours, theirs = network(), network()
    masters = Masters(ours, torch.float32)
    optimizer = Optimizer(masters, AdamSettings(0.9, 0.95, 1e-6, 0.1, max_norm))
    adam = torch.optim.AdamW(
        [
            {"params": [each for each in theirs.parameters() if each.ndim >= 2], "weight_decay": 0.1},
            {"params": [each for each in theirs.parameters() if each.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    for _ in range(4):
        inputs = torch.randn(6, 5)
        for part in torch.split(inputs, 2):  # accumulated
            for model in (ours, theirs):
                model(part).square().sum().backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
        norm = optimizer.step(0.01)
        adam.step()
        adam.zero_grad()
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_not_finite_changes_no_weight() -> None:
    model = network()
    masters = Masters(model, torch.float32)
    before = masters.values.clone()
    masters.gradients[3] = float("nan")
    norm = Optimizer(masters, SETTINGS).step(0.1)
    assert not torch.isfinite(norm)
    assert torch.equal(masters.values, before)


def test_updates_too_small_for_bfloat16_are_not_lost() -> None:
    model = network(torch.bfloat16)
    masters = Masters(model, torch.bfloat16)
    optimizer = Optimizer(masters, AdamSettings(0.9, 0.999, 1e-8, 0.0, 0.0))
    before = masters.values.clone()
    for _ in range(50):
        model(torch.ones(2, 5, dtype=torch.bfloat16)).float().sum().backward()
        optimizer.step(1e-5)
    moved = (masters.values - before).abs()
    assert float(moved.max()) == pytest.approx(50 * 1e-5, rel=0.1)
    weight = next(model.parameters())
    assert weight.dtype == torch.bfloat16
    (_, master), *_ = masters.named(masters.values)
    assert torch.equal(weight, master.bfloat16())


def test_gradients_of_many_micro_batches_are_summed_in_32_bits() -> None:
    model = network(torch.bfloat16)
    masters = Masters(model, torch.bfloat16)
    inputs = torch.ones(1, 5, dtype=torch.bfloat16)
    model(inputs).float().sum().backward()
    once = masters.gradients.clone()
    for _ in range(299):
        model(inputs).float().sum().backward()
    torch.testing.assert_close(masters.gradients, once * 300, rtol=1e-4, atol=1e-4)
    assert all(each.grad is None for each in model.parameters())


def test_the_state_goes_on_where_it_was_saved() -> None:
    def steps(optimizer: Optimizer, masters: Masters, count: int) -> None:
        for number in range(count):
            masters.gradients.copy_(torch.linspace(-1, 1, len(masters)) * (number + 1))
            optimizer.step(0.01)

    straight = Masters(network(), torch.float32)
    optimizer = Optimizer(straight, SETTINGS)
    steps(optimizer, straight, 3)
    saved = optimizer.state()
    resumed = Masters(network(), torch.float32)
    resumed.values.copy_(straight.values)
    other = Optimizer(resumed, SETTINGS)
    other.load(saved)
    steps(optimizer, straight, 2)
    steps(other, resumed, 2)
    assert torch.equal(straight.values, resumed.values)


def test_a_tied_weight_is_one_master_with_two_names() -> None:
    model = nn.Module()
    model.one = nn.Linear(3, 3, bias=False)
    model.two = nn.Linear(3, 3, bias=False)
    model.two.weight = model.one.weight
    masters = Masters(model, torch.float32)
    assert len(masters) == 9
    state = masters.state_dict(model)
    assert state["one.weight"] is state["two.weight"]
