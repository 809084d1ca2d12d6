"""The order of the rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from luthier_trainer.order import RowOrder, epoch_order, hold_out


@given(st.integers(0, 2**32 - 1), st.integers(0, 50), st.integers(1, 300))
def test_an_epoch_visits_every_row_once(seed: int, epoch: int, rows: int) -> None:
    assert sorted(epoch_order(seed, epoch, rows)) == list(range(rows))


def test_the_order_depends_on_seed_and_epoch_and_never_on_the_process() -> None:
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(0, 1, 50).tolist() != epoch_order(0, 0, 50).tolist()
    assert epoch_order(1, 0, 50).tolist() != epoch_order(0, 0, 50).tolist()


def test_an_epochs_last_batch_may_be_smaller_and_the_next_epoch_starts_with_a_full_one() -> None:
    order = RowOrder(np.arange(10), batch_size=4, seed=3)
    assert order.steps_per_epoch == 3
    assert [len(order.batch(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    assert sorted(np.concatenate([order.batch(step) for step in range(3, 6)])) == list(range(10))


@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.floats(0.001, 0.999))
def test_held_out_rows_are_never_trained(seed: int, rows: int, fraction: float) -> None:
    training, validation = hold_out(seed, rows, fraction)
    assert sorted([*training, *validation]) == list(range(rows))
    assert len(training) >= 1
    assert len(validation) == min(max(int(fraction * rows), 1), rows - 1)


def test_without_a_fraction_every_row_is_trained() -> None:
    training, validation = hold_out(0, 5, 0.0)
    assert training.tolist() == [0, 1, 2, 3, 4]
    assert len(validation) == 0
