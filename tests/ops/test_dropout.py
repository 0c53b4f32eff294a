"""Dropout: the mask contract, the arithmetic of what is kept, and where the result goes."""

import dataclasses
import itertools

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.catalogue.dropout import EXTREME, EXTREME_WORDS
from gpu_layers.core.mask import DropoutMask
from gpu_layers.ops.dropout import drop_threshold
from tests import philox_in_ints
from tests.inputs import (
    LAYOUTS,
    accumulation_dtype,
    assert_same_bits,
    assert_same_values,
    each_dtype,
    normal,
    unchanged,
    with_specials,
)

SEED, OFFSET = 2**63 + 12345, 2**32 + 7
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def expected_dropout(x, p, seed=SEED, offset=OFFSET, start=0, scale=None):
    """Kept elements times the scale, in the accumulation dtype, rounded once; +0 for the others."""
    accumulate = accumulation_dtype(x.dtype)
    scale = accumulate.type((1 / (1 - p) if p < 1 else 0.0) if scale is None else scale)
    with np.errstate(all="ignore"):
        scaled = (x.astype(accumulate) * scale).astype(x.dtype)
    keep = philox_in_ints.kept(x.size, p, seed, offset, start).reshape(x.shape)
    return np.where(keep, scaled, x.dtype.type(0))


# Thresholds.


@pytest.mark.parametrize(("element", "word"), EXTREME_WORDS.items())
def test_the_smallest_and_the_largest_word(element, word):
    """The verification's words, by another implementation: p = 0 keeps the one, p = 1 drops the other."""
    assert philox_in_ints.word(*EXTREME, element) == word
    x = np.ones(4)
    for p, kept in ((0, True), (2.0**-32, word > 0), (1 - 2.0**-32, word > 0), (1, False)):
        assert gl.ops.dropout_mask(1, p, *EXTREME, start=element)[0] == kept
        y, _ = gl.ops.dropout_forward(x, p, *EXTREME, start=element)
        assert (y[0] != 0) == kept


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("place", [0, 6, 36])
def test_a_word_drops_from_the_next_probability_on(place, start):
    word, x = philox_in_ints.word(SEED, OFFSET, start + place), np.ones(37)
    for p, value in ((word / 2**32, 1 / (1 - word / 2**32)), ((word + 1) / 2**32, 0)):
        y, saved = gl.ops.dropout_forward(x, p, SEED, OFFSET, start=start)
        assert y[place] == gl.ops.dropout_backward(x, saved)[place] == value


@pytest.mark.parametrize(
    ("p", "threshold"),
    [
        (0.0, 0),
        (1.0, 2**32),
        (0.5, 2**31),
        (0.1, 429496730),
        (2.0**-32, 1),
        (2.0**-33, 0),  # 0.5 rounds to even
        (3 * 2.0**-33, 2),  # so does 1.5
        (np.nextafter(2.0**-33, 1), 1),
        (5e-324, 0),
        (1 - 2.0**-32, 2**32 - 1),
        (1 - 2.0**-33, 2**32),  # 2**32 - 0.5 rounds to even
        (np.nextafter(1.0, 0), 2**32),
    ],
)
def test_threshold_is_p_times_two_to_the_32_rounded(p, threshold):
    assert drop_threshold(p) == threshold


@pytest.mark.parametrize("g", range(12))
def test_an_element_is_dropped_exactly_when_its_word_is_below_the_threshold(g):
    word = philox_in_ints.word(SEED, OFFSET, g)
    for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
        assert gl.ops.dropout_mask(1, p, SEED, OFFSET, start=g).tolist() == [kept]
        y, _ = gl.ops.dropout_forward(np.ones(1), p, SEED, OFFSET, start=g)
        assert (y != 0).tolist() == [kept]


# Masks.


@pytest.mark.parametrize("p", [0.0, 2.0**-32, 0.1, 0.5, 0.9, 1 - 2.0**-32, 1.0])
def test_mask_is_that_of_the_contract(p):
    mask = gl.ops.dropout_mask(101, p, SEED, OFFSET)
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, philox_in_ints.kept(101, p, SEED, OFFSET))


@pytest.mark.parametrize("start", [1, 2**32 - 5, 2**34 - 6, 2**63 - 7, 2**64 - 21])
def test_mask_of_far_elements(start):
    expected = philox_in_ints.kept(21, 0.3, SEED, OFFSET, start)
    np.testing.assert_array_equal(gl.ops.dropout_mask(21, 0.3, SEED, OFFSET, start), expected)
    y, saved = gl.ops.dropout_forward(np.ones(21, np.float32), 0.3, SEED, OFFSET, start=start)
    np.testing.assert_array_equal(y != 0, expected)
    np.testing.assert_array_equal(gl.ops.dropout_backward(np.ones(21, np.float32), saved) != 0, expected)


def test_mask_does_not_depend_on_how_it_is_cut():
    # Larger than any buffer a walk over the elements might use, at a start that is not a multiple of 4.
    n, start = 2 * 2**16 + 77, 2**34 - 2**16 + 3
    whole = gl.ops.dropout_mask(n, 0.4, SEED, OFFSET, start)
    cuts = [0, 1, 6, 2**16 - 1, 2**16 + 2, 2**17 + 5, n]
    parts = [gl.ops.dropout_mask(b - a, 0.4, SEED, OFFSET, start + a) for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    spots = np.random.default_rng(0).integers(0, n, 500)
    expected = [philox_in_ints.word(SEED, OFFSET, start + int(i)) >= round(0.4 * 2**32) for i in spots]
    np.testing.assert_array_equal(whole[spots], expected)


@each_dtype
@each_layout
def test_mask_is_the_same_for_every_dtype_and_layout(dtype, layout):
    y, _ = gl.ops.dropout_forward(layout(np.ones((5, 7, 3), dtype)), 0.5, 1, 2)
    np.testing.assert_array_equal(y != 0, philox_in_ints.kept(105, 0.5, 1, 2).reshape(5, 7, 3))


@each_dtype
def test_shards_together_are_the_whole(dtype):
    x = normal((3 * 2**16 + 5,), dtype)
    whole, _ = gl.ops.dropout_forward(x, 0.3, SEED, OFFSET)
    cuts = [0, 5, 2**16 + 1, 2**17 + 2, x.size]
    for start, stop in itertools.pairwise(cuts):
        shard, saved = gl.ops.dropout_forward(x[start:stop], 0.3, SEED, OFFSET, start=start)
        assert_same_bits(shard, whole[start:stop])
        assert_same_bits(gl.ops.dropout_backward(x[start:stop], saved), whole[start:stop])


def test_the_dropped_fraction_is_p():
    # A binomial count of 10**6: six standard deviations, 6 * sqrt(p (1 - p) / 10**6).
    for p in (0.01, 0.5, 0.99):
        dropped = 1 - gl.ops.dropout_mask(10**6, p, SEED, 0).mean()
        assert abs(dropped - p) < 6 * np.sqrt(p * (1 - p) / 10**6)


def test_other_seeds_and_offsets_give_other_masks():
    masks = {
        gl.ops.dropout_mask(256, 0.5, seed, offset).tobytes() for seed in (0, 1, 2**32) for offset in (0, 1, 2**32)
    }
    assert len(masks) == 9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 0.5, 0, 0), ValueError, "n must be in 0"),
        ((2.0, 0.5, 0, 0), TypeError, "n must be an integer, got float"),
        ((2, 1.5, 0, 0), ValueError, r"dropout probability has to be between 0 and 1, but got 1\.5"),
        ((2, 0.5, -1, 0), ValueError, "seed must be in 0"),
        ((2, 0.5, 0, 2**64), ValueError, "offset must be in 0"),
        ((2, 0.5, 0, 0, -1), ValueError, "start must be in 0"),
        ((2, 0.5, 0, 0, 2**64 - 1), ValueError, r"start must be in 0 \.\. 18446744073709551614"),
    ],
)
def test_mask_refuses_bad_numbers(arguments, error, message):
    with pytest.raises(error, match=message):
        gl.ops.dropout_mask(*arguments)


def test_mask_of_nothing():
    assert gl.ops.dropout_mask(0, 0.5, 0, 0, 2**64).shape == (0,)


# Values.


@each_dtype
@each_layout
@pytest.mark.parametrize("p", [0.1, 0.5, 0.7])
def test_forward_and_backward_values(dtype, layout, p):
    x, dy = layout(normal((3, 5, 7), dtype)), layout(normal((3, 5, 7), dtype, seed=1))
    with unchanged(x, dy):
        y, saved = gl.ops.dropout_forward(x, p, SEED, OFFSET, start=2**34 - 50)
        dx = gl.ops.dropout_backward(dy, saved)
    assert_same_bits(y, expected_dropout(x, p, start=2**34 - 50))
    assert_same_bits(dx, expected_dropout(dy, p, start=2**34 - 50))
    assert y.flags.c_contiguous


@each_dtype
def test_what_is_dropped_is_plus_zero_whatever_it_was(dtype):
    x = with_specials((500,), dtype)
    y, saved = gl.ops.dropout_forward(x, 0.5, SEED, OFFSET)
    assert_same_values(y, expected_dropout(x, 0.5))
    dropped = y[~philox_in_ints.kept(500, 0.5, SEED, OFFSET)]
    assert dropped.size > 200
    assert dropped.tobytes() == bytes(dropped.nbytes)
    assert_same_bits(gl.ops.dropout_backward(x, saved), y)


@each_dtype
def test_p_0_is_the_identity(dtype):
    x = with_specials((300,), dtype)
    y, saved = gl.ops.dropout_forward(x, 0, SEED, OFFSET)
    assert_same_values(y, x)
    assert not np.shares_memory(x, y)
    assert_same_values(gl.ops.dropout_backward(x, saved), x)


@each_dtype
@pytest.mark.parametrize("p", [1, 1 - 2.0**-40])
def test_p_1_gives_zeros_and_no_nan(dtype, p):
    x = with_specials((300,), dtype)
    y, saved = gl.ops.dropout_forward(x, p, SEED, OFFSET)
    assert_same_bits(y, np.zeros(300, dtype))
    assert_same_bits(gl.ops.dropout_backward(x, saved), np.zeros(300, dtype))


def test_a_p_that_rounds_to_threshold_0_drops_nothing():
    x = normal((100,))
    assert_same_bits(gl.ops.dropout_forward(x, 2.0**-40, SEED, OFFSET)[0], x * (1 / (1 - 2.0**-40)))


@each_dtype
def test_kept_elements_overflow_to_infinity_without_a_warning(dtype):
    largest = np.full(100, np.inf, dtype)
    largest = np.nextafter(largest, np.zeros_like(largest))
    y, _ = gl.ops.dropout_forward(largest, 0.5, SEED, OFFSET)
    keep = philox_in_ints.kept(100, 0.5, SEED, OFFSET)
    np.testing.assert_array_equal(y.astype(np.float64), np.where(keep, np.inf, 0))


def test_half_types_are_scaled_in_float32():
    # 1 / (1 - 0.3) rounded to float16 first would give another product for some of these.
    x = np.arange(1, 2000).astype(np.float16)
    y, _ = gl.ops.dropout_forward(x, 0.3, SEED, OFFSET)
    in_float32 = (x.astype(np.float32) * np.float32(1 / 0.7)).astype(np.float16)
    in_float16 = x * np.float16(1 / 0.7)
    keep = y != 0
    assert (in_float32 != in_float16)[keep].any()
    assert_same_bits(y[keep], in_float32[keep])


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scale_can_be_given(scale):
    x = normal((50,), np.float32)
    y, saved = gl.ops.dropout_forward(x, 0.4, SEED, OFFSET, scale=scale)
    assert_same_bits(y, expected_dropout(x, 0.4, scale=scale))
    assert_same_bits(gl.ops.dropout_backward(x, saved), y)


@each_dtype
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1, 1, 1), (13,)])
def test_any_shape(dtype, shape):
    x = normal(shape, dtype=np.float64).astype(dtype) if shape else np.array(1.5, dtype)
    for p in (0.0, 0.5, 1.0):
        y, saved = gl.ops.dropout_forward(x, p, SEED, OFFSET)
        assert_same_bits(y, np.asarray(expected_dropout(x, p)))
        assert_same_bits(gl.ops.dropout_backward(x, saved), y)


def test_saved_holds_numbers_and_no_array():
    _, saved = gl.ops.dropout_forward(np.ones((2, 3), np.float16), 0.25, 5, 6, start=7)
    fields = {field.name: getattr(saved, field.name) for field in dataclasses.fields(saved)}
    assert type(fields["writes"]) is int
    assert fields == {
        "writes": fields["writes"],
        "mask": DropoutMask(drop_below=2**30, seed=5, offset=6, start=7, run=1, sample_ids=None),
        "scale": 1 / 0.75,
        "shape": (2, 3),
        "dtype": np.dtype(np.float16),
        "channels_last": False,
    }
    assert not hasattr(saved, "__dict__") or set(vars(saved)) == set(fields)


# Where the result goes.


@pytest.mark.parametrize("shift", [-3, 3])
def test_out_may_overlap_the_input(shift):
    # Longer than any buffer of the walk: what is written early must not be read late.
    n = 2 * 2**16 + 9
    memory = normal((n + 3,), np.float32)
    x, out = (memory[3:], memory[:n]) if shift < 0 else (memory[:n], memory[3:])
    expected, _ = gl.ops.dropout_forward(x.copy(), 0.5, SEED, OFFSET)
    gl.ops.dropout_forward(x, 0.5, SEED, OFFSET, out=out)
    assert_same_bits(out, expected)


def test_without_out_the_result_is_new_memory():
    x = normal((10,), np.float32)
    y, saved = gl.ops.dropout_forward(x, 0.5, SEED, OFFSET)
    assert not np.shares_memory(x, y)
    assert not np.shares_memory(x, gl.ops.dropout_backward(x, saved))


# Bad input.

X = normal((6,), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": 1.5}, ValueError, r"^dropout probability has to be between 0 and 1, but got 1\.5$"),
        ({"p": -0.1}, ValueError, r"^dropout probability has to be between 0 and 1, but got -0\.1$"),
        ({"p": float("nan")}, ValueError, "^dropout probability has to be between 0 and 1, but got nan$"),
        ({"p": float("inf")}, ValueError, "but got inf"),
        ({"p": "0.5"}, TypeError, "dropout probability must be a number, got str"),
        ({"p": None}, TypeError, "dropout probability must be a number, got NoneType"),
        ({"p": True}, TypeError, "dropout probability must be a number, got bool"),
        ({"p": np.array([0.5])}, TypeError, "dropout probability must be a number, got ndarray"),
        ({"p": 0.5j}, TypeError, "dropout probability must be a number, got complex"),
        ({"seed": -1}, ValueError, "seed must be in 0"),
        ({"seed": 2**64}, ValueError, "seed must be in 0"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got float"),
        ({"offset": -1}, ValueError, "offset must be in 0"),
        ({"offset": None}, TypeError, "offset must be an integer, got NoneType"),
        ({"start": -1}, ValueError, "start must be in 0"),
        ({"start": 2**64 - 5}, ValueError, r"start must be in 0 \.\. 18446744073709551610"),
        ({"start": 0.0}, TypeError, "start must be an integer, got float"),
        ({"scale": "2"}, TypeError, "scale must be a number, got str"),
        ({"mask_axes": 0}, ValueError, r"mask_axes must be in 1 \.\. 1, got 0"),
        ({"mask_axes": 2}, ValueError, r"mask_axes must be in 1 \.\. 1, got 2"),
        ({"mask_axes": 1.0}, TypeError, "mask_axes must be an integer, got float"),
        ({"sample_ids": [0] * 6}, TypeError, "expected a numpy.ndarray or cupy.ndarray, got list"),
        ({"sample_ids": np.arange(6, dtype=np.int32)}, TypeError, "sample_ids must be int64, got int32"),
        (
            {"sample_ids": np.arange(5)},
            ValueError,
            r"sample_ids must have the shape \[6\], one number per row, got \[5\]",
        ),
        ({"sample_ids": np.ones((6, 1), int)}, ValueError, r"sample_ids must have the shape \[6\].*, got \[6, 1\]"),
        ({"sample_ids": np.arange(6), "start": 2**64}, ValueError, r"start must be in 0 \.\. 18446744073709551615"),
        ({"out": np.zeros(6)}, TypeError, "out must have the result's dtype float32, got float64"),
        ({"out": np.zeros(5, np.float32)}, ValueError, r"out must have the result's shape \[6\], got \[5\]"),
        ({"out": np.zeros((2, 3), np.float32)}, ValueError, r"out must have the result's shape \[6\], got \[2, 3\]"),
        ({"out": [0.0] * 6}, TypeError, "expected a numpy.ndarray or cupy.ndarray, got list"),
        ({"out": LAYOUTS["read_only"](X)}, ValueError, "out is read-only"),
    ],
)
def test_forward_refuses_bad_arguments_and_writes_nothing(change, error, message):
    out = np.full(6, 9, np.float32)
    arguments = {"p": 0.5, "seed": 1, "offset": 2, "out": out} | change
    with unchanged(X, out), pytest.raises(error, match=message):
        gl.ops.dropout_forward(X, **arguments)


def test_the_last_element_there_can_be():
    # g = 2**64 - 1 is the last index that the counter of the contract can hold.
    gl.ops.dropout_forward(X, 0.5, 1, 2, start=2**64 - 6)


@pytest.mark.parametrize("p", [0, 1, np.float32(0.5), np.float16(0.25), np.float64(0.5), np.int64(1)])
def test_any_real_number_is_a_probability(p):
    y, _ = gl.ops.dropout_forward(X, p, SEED, OFFSET)
    assert_same_bits(y, expected_dropout(X, float(p)))


def test_backward_refuses_a_gradient_that_does_not_fit_and_writes_nothing():
    _, saved = gl.ops.dropout_forward(X, 0.5, 1, 2)
    out = np.full(6, 9, np.float32)
    with unchanged(out), pytest.raises(ValueError, match=r"dy must have the output's shape \[6\], got \[5\]"):
        gl.ops.dropout_backward(np.ones(5, np.float32), saved, out=out)
