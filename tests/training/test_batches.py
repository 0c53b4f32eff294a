"""Shuffling and cutting into batches."""

import numpy as np
import pytest

from gpu_layers.training.batches import batch_count, batches, epoch_order


@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("batch_size", [2, 4, 8, 100])
def test_every_sample_once_and_none_alone(n, batch_size):
    parts = [list(range(n))[part] for part in batches(n, batch_size)]
    assert [sample for part in parts for sample in part] == list(range(n))
    assert min(map(len, parts)) >= 2
    assert max(map(len, parts)) <= batch_size + 1
    assert batch_count(n, batch_size) == len(parts)


def test_a_single_remaining_sample_joins_the_batch_before():
    assert list(batches(9, 4)) == [slice(0, 4), slice(4, 9)]
    assert list(batches(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]


def test_order_depends_on_seed_and_epoch_alone():
    order = epoch_order(1000, 3, 5)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, epoch_order(1000, 3, 5))
    # Two random orders agree at about one place in a thousand.
    for other in (epoch_order(1000, 3, 6), epoch_order(1000, 4, 5), np.arange(1000)):
        assert (order == other).sum() < 20
