"""Philox against the published known answers, and random words against plain integers."""

import numpy as np
import pytest

from gpu_layers.core.philox import philox4x32_10, random_words, sample_seed, sample_words
from tests import philox_in_ints

# The lines "philox4x32 10" of Random123's tests/kat_vectors (D. E. Shaw Research): counter, key, expected words.
# The last counter and key are hexadecimal digits of pi.
KNOWN_ANSWERS = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}
each_known_answer = pytest.mark.parametrize(
    ("counter", "key", "expected"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys()
)


@each_known_answer
def test_reference_gives_the_known_answers(counter, key, expected):
    words = philox4x32_10(np.array(counter, np.uint32).reshape(4, 1), tuple(key))
    assert words.dtype == np.uint32
    assert words.tolist() == [expected]


@each_known_answer
def test_integers_give_the_known_answers(counter, key, expected):
    assert philox_in_ints.philox4x32(counter, key) == expected


def test_counters_are_columns_and_do_not_mix():
    counters = np.array([counter for counter, _, _ in KNOWN_ANSWERS.values()], np.uint32).T
    for row, (_, key, expected) in enumerate(KNOWN_ANSWERS.values()):
        assert philox4x32_10(counters, tuple(key))[row].tolist() == expected


def test_inputs_are_left_alone():
    counter = np.array(KNOWN_ANSWERS["pi"][0], np.uint32).reshape(4, 1)
    philox4x32_10(counter, (1, 2))
    assert counter.ravel().tolist() == KNOWN_ANSWERS["pi"][0]


# Where a word of the counter carries: g >> 2 passes 2**32 at g = 2**34; g itself passes 32 and 63 bits.
STARTS = [0, 1, 2, 3, 2**32 - 5, 2**34 - 6, 2**34 + 1, 2**63 - 7, 2**63, 2**64 - 11]


@pytest.mark.parametrize("start", STARTS)
def test_words_are_those_of_the_contract(start):
    seed, offset = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    expected = [philox_in_ints.word(seed, offset, g) for g in range(start, start + 11)]
    assert random_words(seed, offset, start, 11).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 2**32 - 1, 2**32, 2**64 - 1])
def test_every_bit_of_seed_and_offset_counts(seed, offset):
    assert random_words(seed, offset, 5, 6).tolist() == [philox_in_ints.word(seed, offset, g) for g in range(5, 11)]


@pytest.mark.parametrize("count", range(10))
@pytest.mark.parametrize("start", range(4))
def test_any_start_and_count_cut_the_same_stream(start, count):
    stream = random_words(7, 9, 0, 20)
    words = random_words(7, 9, start, count)
    assert words.dtype == np.uint32
    assert words.tolist() == stream[start : start + count].tolist()


SAMPLES = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]


@pytest.mark.parametrize("seed", [0, 2**63 + 5, 2**64 - 1])
def test_a_sample_has_the_words_of_a_seed_of_its_own(seed):
    for sample_id in SAMPLES:
        assert sample_seed(seed, sample_id) == philox_in_ints.sample_seed(seed, sample_id)
    for start, count in ((0, 9), (2**34 - 5, 11), (2, 1)):
        words = sample_words(seed, 2**40 + 3, np.array(SAMPLES), start, count)
        expected = [random_words(sample_seed(seed, sample), 2**40 + 3, start, count) for sample in SAMPLES]
        assert words.tolist() == np.array(expected).tolist()


def test_words_of_no_samples():
    assert sample_words(1, 2, np.array([], np.int64), 0, 5).shape == (0, 5)
