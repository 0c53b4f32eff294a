"""Frequencies, pairs and neighbours of the random words, of fixed seeds: 105 statistics, all within 5 deviations."""

import numpy as np
import pytest

from tests.statistical.measures import dropped, frequencies, neighbours, one_bit_apart
from tests.statistical.report import BITS, SEED
from tests.statistical.streams import ORDERS, words

DRAWS = [10**7, pytest.param(10**8, marks=pytest.mark.slow)]
each_order = pytest.mark.parametrize("order", ORDERS)
each_count = pytest.mark.parametrize("count", DRAWS)


def assert_usual(deviations):
    assert {name: one for name, one in deviations.items() if not abs(one) < 5} == {}


@each_count
@each_order
def test_frequencies(order, count):
    assert_usual(frequencies(words(order, SEED, count)))


@each_count
@each_order
def test_neighbours(order, count):
    assert_usual(neighbours(words(order, SEED + 1, count)))


@each_count
@pytest.mark.parametrize("bit", BITS)
@pytest.mark.parametrize("which", ["seed", "offset"])
def test_numbers_that_differ_in_one_bit_give_independent_words(which, bit, count):
    assert_usual({"agreeing bits": one_bit_apart(which, bit, SEED, count // 10)})


@pytest.mark.parametrize("count", [10**7, pytest.param(10**9, marks=pytest.mark.slow)])
def test_the_dropped_fraction_is_p(count):
    found, total, deviations = dropped(words("element", 1, count), 0.1)
    assert total == count
    assert_usual({f"{found} of {total}": deviations})


@pytest.mark.parametrize(
    ("spoil", "measure", "name"),
    [
        (lambda word: word - (word >> np.uint32(6)), frequencies, "p = 0.5"),
        (lambda word: word & ~np.uint32(3), frequencies, "low halves"),
        (lambda word: np.repeat(word[::2], 2), frequencies, "pairs of bytes"),
        (lambda word: np.repeat(word[::2], 2), neighbours, "p = 0.1, distance 1"),
        (lambda word: np.tile(word[:4096], word.size // 4096), neighbours, "p = 0.5, distance 4096"),
    ],
)
def test_words_that_are_not_random_are_found_out(spoil, measure, name):
    assert abs(measure(map(spoil, words("element", SEED, 10**6)))[name]) > 5
