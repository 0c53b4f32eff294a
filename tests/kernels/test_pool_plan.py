"""Which kernel a pooling takes, decided from shapes alone: of arrays that no test could hold."""

from dataclasses import replace

import pytest

from gpu_layers.core.window import Window
from gpu_layers.kernels.pool_plan import _general_plan, _tiled_plan, division
from gpu_layers.runtime.limits import limits

# No index may be beyond 32 bits, nor may one of a block's threads that is beyond the end of an image.
BELOW = 2**31 - 1024


def window(inputs, outputs, kernel=1, stride=1, dilation=1, pad=0, adaptive=False):
    """Equal on all axes."""
    sizes = ((size,) * len(inputs) for size in (kernel, stride, dilation, pad, pad))
    return Window(*sizes, inputs, outputs, adaptive)


def general(of, channels=1, channels_last=False, itemsize=4, most=256):
    plan = _general_plan(of, "output", (1, channels), itemsize, channels_last, most, limits().index32_below)
    return plan.template_arguments["Index"], int(plan.template_arguments["Width"])


def index(of, channels=1, channels_last=False):
    return general(of, channels, channels_last)[0]


@pytest.mark.parametrize(
    ("largest", "too_large"),
    [
        # An axis with two windows and a stride to spare: positions of taps are compared with the axis's size.
        (window((BELOW - 4,), (BELOW - 4,)), window((BELOW - 3,), (BELOW - 3,))),
        # A plane of inputs, and of outputs.
        (window((2**16, 2**15 - 1), (1, 1), adaptive=True), window((2**16, 2**15), (1, 1), adaptive=True)),
        (window((2, 2), (2**16, 2**15 - 1), adaptive=True), window((2, 2), (2**16, 2**15), adaptive=True)),
        # Taps apart: two of them, 2**29 from each other, and one beyond.
        (window((9,), (1,), 2, 1, 2**29 + 2**27), window((9,), (1,), 2, 1, 2**29 + 2**28)),
        # Padding on both sides.
        (window((9,), (9,), 1, 1, 1, 2**30 - 1024), window((9,), (9,), 1, 1, 1, 2**30)),
        # Bounds of adaptive windows: a product of an input's and an output's number.
        (window((2**16,), (2**15 - 2,), adaptive=True), window((2**16,), (2**15 - 1,), adaptive=True)),
    ],
    ids=["axis", "inputs", "outputs", "dilation", "padding", "adaptive"],
)
def test_indices_have_32_bits_up_to_where_they_fit(largest, too_large):
    assert limits().index32_below == BELOW
    assert index(largest) == "int"
    assert index(too_large) == "long long"


def test_channels_side_by_side_are_a_part_of_the_image():
    size = BELOW // 8
    assert BELOW % 8 == 0
    assert index(window((size - 1,), (size - 1,)), 8, True) == "int"
    assert index(window((size,), (size,)), 8, True) == "long long"
    # Planes one after another are images of their own, however many.
    assert index(window((size,), (size,)), 2**20) == "int"


def test_only_whole_vectors_of_channels_with_few_taps_are_taken_at_once():
    few, many = window((300,), (45,), 256), window((300,), (44,), 257)
    assert general(few, 8, True) == ("int", 4)
    assert general(few, 8, True, itemsize=2) == ("int", 8)
    assert general(few, 12, True, itemsize=2) == ("int", 1)
    assert general(many, 8, True) == ("int", 1)
    assert general(many, 8, True, most=257) == ("int", 4)
    assert general(few, 8) == ("int", 1)
    # With 64 bits there are kernels for single channels alone.
    assert general(window((BELOW,), (BELOW,)), 8, True) == ("long long", 1)


def test_tiles_are_for_what_32_bits_number():
    def tiled(width):
        of = window((2, width), (1, width // 2), 2, 2)
        return _tiled_plan(of, "output", (1, 1), 4, False, limits().index32_below, limits().full_grid)

    assert tiled(BELOW // 2 - 2) is not None
    assert tiled(BELOW // 2) is None


def test_tiles_are_for_windows_whose_reciprocals_the_host_makes():
    """Of fewer than 128 taps: the struct has no more."""

    def tiled(depth):
        of = window((depth, 4, 8), (1, 2, 4), 2, 2)
        of = replace(of, kernel=(depth, 2, 2), stride=(depth, 2, 2))
        return _tiled_plan(of, "output", (1, 8), 4, False, limits().index32_below, limits().full_grid)

    assert tiled(31) is not None
    assert tiled(32) is None


# A number below 2**31 over one; the largest of each bit length, and their neighbours.
DIVISORS = sorted({1, 2, 3, 7, 10, 1000, *(2**bits + off for bits in range(2, 31) for off in (-1, 0, 1)), 2**31 - 1})


@pytest.mark.parametrize("value", DIVISORS)
def test_divisions_are_exact(value):
    """As ``Divisor32`` of ``fast_division.cuh`` divides."""
    divisor, multiplier, shift = division(value)
    assert divisor == value
    assert multiplier < 2**32
    most = 2**31 - 1
    numbers = {0, 1, value - 1, value, most, most // value * value, most // value * value - 1, 12345678}
    for number in numbers:
        assert ((number * multiplier >> 32) + number) >> shift == number // value


@pytest.mark.parametrize("value", [0, -1, 2**31, 2**32 - 1, 2**40])
def test_what_32_bits_do_not_divide_by_is_divided_by_otherwise(value):
    assert division(value) == (0, 0, 0)
