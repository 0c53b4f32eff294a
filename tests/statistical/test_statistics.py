"""Frequencies, pairs and neighbours of the random words, over many draws.

Every statistic is compared with its expectation in units of its own deviation. Five of them are exceeded by chance once
in 1.7 million; there are some 200 statistics here, of fixed seeds.
"""

import numpy as np
import pytest

from gpu_layers.ops.dropout import drop_threshold
from gpu_layers.reference.philox import random_words
from tests.statistical.streams import CHUNK, ORDERS, words

SEED = 20240229
DRAWS = [10**7, pytest.param(10**8, marks=pytest.mark.slow)]
each_order = pytest.mark.parametrize("order", ORDERS)
each_count = pytest.mark.parametrize("count", DRAWS)
LAGS = (1, 2, 3, 4, 5, 8, 16, 4096)


def deviations_of_chi_squared(counts):
    """How many deviations chi squared is from its expectation, of cells that are equally likely."""
    expected = counts.sum() / counts.size
    chi_squared = ((counts - expected) ** 2).sum() / expected
    freedom = counts.size - 1
    return abs(chi_squared - freedom) / np.sqrt(2 * freedom)


@each_count
@each_order
def test_frequencies(order, count):
    """Dropped fractions for several p; both halves of the words, and pairs of bytes of neighbours, in 65,536 cells."""
    probabilities = np.array([0.001, 0.1, 0.3, 0.5, 0.9])
    thresholds = [np.uint32(drop_threshold(p)) for p in probabilities]
    dropped = np.zeros(probabilities.size)
    low, high, pairs = (np.zeros(65536) for _ in range(3))
    total = 0
    for chunk in words(order, SEED, count):
        dropped += [np.count_nonzero(chunk < threshold) for threshold in thresholds]
        halves = chunk.view(np.uint16).reshape(-1, 2)
        low += np.bincount(halves[:, 0], minlength=65536)
        high += np.bincount(halves[:, 1], minlength=65536)
        bytes_ = (chunk >> np.uint32(24)).astype(np.intp)
        pairs += np.bincount(bytes_[0::2] << 8 | bytes_[1::2], minlength=65536)
        total += chunk.size
    assert total >= count
    exact = np.array([float(threshold) for threshold in thresholds]) / 2**32
    assert (np.abs(dropped - total * exact) < 5 * np.sqrt(total * exact * (1 - exact))).all()
    for cells in (low, high, pairs):
        assert deviations_of_chi_squared(cells) < 5


@each_count
@each_order
def test_neighbours(order, count):
    """Whether two are dropped together, at several distances, is as likely as for independent ones."""
    for p in (0.1, 0.5):
        threshold = np.uint32(drop_threshold(p))
        together, pairs = np.zeros(len(LAGS)), np.zeros(len(LAGS))
        for chunk in words(order, SEED + 1, count):
            is_dropped = chunk < threshold
            for number, lag in enumerate(LAGS):
                together[number] += np.count_nonzero(is_dropped[lag:] & is_dropped[:-lag])
                pairs[number] += CHUNK - lag
        # Of n overlapping pairs the variance is n (p**2 - p**4 + 2 (p**3 - p**4)): neighbours share an element.
        deviation = np.sqrt(pairs * (p**2 - p**4 + 2 * (p**3 - p**4)))
        assert (np.abs(together - pairs * p**2) < 5 * deviation).all()


@each_count
@pytest.mark.parametrize("bit", [1, 2**31, 2**32, 2**63])
@pytest.mark.parametrize("which", ["seed", "offset"])
def test_numbers_that_differ_in_one_bit_give_independent_words(which, bit, count):
    """Of two streams half of the bits agree."""
    agreeing = total = 0
    for first in range(0, count // 10, CHUNK):
        one = random_words(SEED, 7, first, CHUNK)
        other = (
            random_words(SEED ^ bit, 7, first, CHUNK) if which == "seed" else random_words(SEED, 7 ^ bit, first, CHUNK)
        )
        agreeing += 32 * CHUNK - int(np.bitwise_count(one ^ other).sum())
        total += 32 * CHUNK
    assert abs(agreeing - total / 2) < 5 * np.sqrt(total) / 2
