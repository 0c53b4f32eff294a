"""Pooling by tiles: rows of taps that windows share, at every edge, and that the general kernels give the same bits."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import DTYPES, UNIT_ROUNDOFF, assert_same_bits, assert_same_values, emulated, normal

WINDOWS = [((2, 2), 2, 0), ((3, 3), 2, 1), ((3, 3), 1, 1)]
# Only of the maximum.
LARGE_WINDOWS = [((5, 5), 1, 2)]
# Planes smaller than a window, of one tile and a bit, of whole tiles, and of halves and quarters of them; a row whose
# last window is cut off.
PLANES = [(1, 2), (2, 3), (4, 16), (5, 17), (9, 8), (3, 28), (4, 14)]
TILED_DTYPES = [dtype for dtype in DTYPES if np.dtype(dtype).itemsize < 8]


def mostly_special(shape, dtype):
    """Half of the values are infinite, NaN or zeros of both signs: most windows hold nothing else, or ties."""
    x = normal(shape, dtype, seed=3)
    rng = np.random.default_rng(4)
    special = np.array([-np.inf, -np.inf, np.nan, np.inf, 0.0, -0.0, 1.0, 1.0], dtype)[rng.integers(8, size=shape)]
    return np.where(rng.random(shape) < 0.7, special, x)


def windows_of(plane, windows=WINDOWS):
    return [window for window in windows if window[0][0] > 2 or min(plane) >= 2]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_edges_ties_and_special_values(dtype, plane, channels_last):
    launched = []
    for (window, stride, padding), ceil_mode in [
        (w, c) for w in windows_of(plane, WINDOWS + LARGE_WINDOWS) for c in (False, True)
    ]:
        arguments = {"padding": padding, "ceil_mode": ceil_mode, "channels_last": channels_last}
        x = mostly_special((2, *plane, 16) if channels_last else (2, 3, *plane), dtype)
        y, saved = gl.ops.max_pool_forward(x, window, stride, **arguments)
        dy = normal(y.shape, dtype, seed=5)
        dx = gl.ops.max_pool_backward(dy, saved)
        # As few strips as there are, and as many.
        for full_grid in (1, 10**6):
            with emulated(launched, full_grid=full_grid):
                own_y, own_saved = gl.ops.max_pool_forward(x, window, stride, **arguments)
                assert_same_bits(own_y, y)
                assert_same_bits(own_saved.argmax, saved.argmax)
                assert_same_bits(gl.ops.max_pool_backward(dy, own_saved), dx)
    assert launched
    assert all("_tiled<" in name or "_wide<" in name or "global" in name for name in launched)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("window", "stride", "padding"), [*WINDOWS, *LARGE_WINDOWS], ids=str)
def test_bytes_that_are_no_taps_reach_no_other_memory(window, stride, padding, channels_last):
    """What a gradient is worth then is not said; its neighbours in memory stay what they are."""
    x = normal((2, 9, 17, 8) if channels_last else (2, 8, 9, 17), np.float32)
    y, saved = gl.ops.max_pool_forward(x, window, stride, padding=padding, channels_last=channels_last)
    saved.argmax[...] = np.random.default_rng(1).integers(window[0] ** 2, 256, saved.argmax.shape)
    with gl.use_backend("emulated", check=True):
        assert gl.ops.max_pool_backward(y, saved).shape == x.shape


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_norms_of_windows_side_by_side(dtype, plane, channels_last):
    launched, window = [], (2, 2) if plane[0] > 1 else (1, 2)
    exponents = (0,) if dtype == np.float16 else (-130, -60, -40, 0, 50, 70, 126)
    for p in (1, 2):
        for exponent in exponents:
            x = normal((2, *plane, 16) if channels_last else (2, 3, *plane), dtype)
            x = (x / np.abs(x.astype(np.float64)).max() * 2.0**exponent).astype(dtype)
            if exponent == 0:
                x = mostly_special(x.shape, dtype)
            # One axis is a plane of height 1 to tiles.
            x = x.reshape(x.shape[0], -1, 16) if channels_last and plane[0] == 1 else x
            x = x.reshape(*x.shape[:2], -1) if not channels_last and plane[0] == 1 else x
            size = window if plane[0] > 1 else window[1:]
            y, saved = gl.ops.lp_pool_forward(x, p, size, channels_last=channels_last)
            dy = normal(y.shape, dtype, seed=5)
            dx = gl.ops.lp_pool_backward(dy, saved)
            found = []
            for full_grid in (1, 10**6):
                with emulated(launched, full_grid=full_grid):
                    own_y, own_saved = gl.ops.lp_pool_forward(x, p, size, channels_last=channels_last)
                    found.append((own_y, gl.ops.lp_pool_backward(dy, own_saved)))
            for own, other in zip(*found, strict=True):
                assert_same_bits(own, other)
            # The reference is computed in float64, and rounded: half types in float32, whose errors move few of them.
            smallest = float(np.finfo(np.float32).smallest_subnormal) if dtype == np.float32 else 0.0
            for own, expected in zip(found[0], (y, dx), strict=True):
                own, expected = own.astype(np.float64), expected.astype(np.float64)
                np.testing.assert_allclose(own, expected, rtol=2 * UNIT_ROUNDOFF[dtype], atol=smallest)
                assert_same_values(np.signbit(own[own == 0]), np.signbit(expected[expected == 0]))
    assert launched
    assert all("lp_pool" in name and "_tiled<" in name for name in launched)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("dtype", TILED_DTYPES, ids=str)
def test_averages_of_tiled_and_general_kernels_have_the_same_bits(dtype, plane, channels_last):
    launched = []
    for window, stride, padding in windows_of(plane):
        arguments = {"padding": padding, "count_include_pad": False, "channels_last": channels_last}
        x = mostly_special((2, *plane, 16) if channels_last else (2, 3, *plane), dtype)
        results = []
        # 64-bit indices are the general kernels' alone.
        for index64 in (False, True):
            with emulated(launched, index64=index64, full_grid=1):
                y, saved = gl.ops.avg_pool_forward(x, window, stride, **arguments)
                results.append((y, gl.ops.avg_pool_backward(normal(y.shape, dtype, seed=5), saved)))
        (y, dx), (general_y, general_dx) = results
        # Which NaN a sum of two of them is, IEEE 754 leaves open.
        assert_same_values(y, general_y)
        assert_same_bits(dx, general_dx)
    assert {"_tiled<" in name for name in launched} == {True, False}
