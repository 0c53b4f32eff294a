"""Windows of many taps, and windows far larger than the input: sums keep their bits, and only what touches the input
costs anything."""

import itertools
import time

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import DTYPES, UNIT_ROUNDOFF, accumulation_dtype, assert_same_bits, assert_within, normal

both_floors = pytest.mark.parametrize("backend", ["reference", "emulated"])
ops = gl.ops

# Of 0.1 in float32 the plain sum of 2**20 is off by 1 %. The kernels add 32 values plainly, and such sums with
# compensation: 32 roundings, and those of the sum, of the factor and of the product. The reference rounds once, and
# divides.
MOST = 36


@both_floors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "pool", "options"),
    [
        ((1, 1, 2**20), "adaptive", {}),
        ((1, 2, 2**17 - 3), "adaptive", {}),
        ((1, 2**15 + 1, 8), "adaptive", {"channels_last": True}),
        ((1, 2**13 + 1, 3), "adaptive", {"channels_last": True}),
        ((1, 1, 2**15 + 2), (2**15 + 1,), {"stride": 1}),
        ((1, 70, 80, 4), (67, 77), {"stride": (3, 2), "channels_last": True}),
        ((1, 1, 300, 150), (300, 2), {}),
    ],
    ids=str,
)
def test_long_averages_are_as_good_as_short_ones(backend, dtype, shape, pool, options):
    x = (np.abs(normal(shape)) * 0.01 + 0.1).astype(dtype)
    x.reshape(-1)[1::7] = 0.1
    exact = _averages(x.astype(np.float64), pool, **options)
    with gl.use_backend(backend):
        if pool == "adaptive":
            y, _ = ops.adaptive_avg_pool_forward(x, (1,), **options)
        else:
            y, _ = ops.avg_pool_forward(x, pool, **options)
    unit = MOST * UNIT_ROUNDOFF[accumulation_dtype(dtype)] + UNIT_ROUNDOFF[dtype]
    assert_within(y, exact, unit * exact)


def _averages(x, pool, stride=None, channels_last=False):
    """Of float64, by longer sums still: pairwise, of float64 by itself in longer numbers where there are any."""
    planes = np.moveaxis(x, -1, 1) if channels_last else x
    if pool == "adaptive":
        means = planes.astype(np.longdouble).mean(axis=-1, keepdims=True)
    else:
        strides = pool if stride is None else np.broadcast_to(stride, len(pool))
        axes = tuple(range(2, x.ndim))
        windows = np.lib.stride_tricks.sliding_window_view(planes, pool, axes)
        windows = windows[(slice(None), slice(None), *(slice(None, None, step) for step in strides))]
        means = windows.astype(np.longdouble).mean(axis=tuple(range(-len(pool), 0)))
    means = means.astype(np.float64)
    return np.moveaxis(means, 1, -1) if channels_last else means


@both_floors
@pytest.mark.parametrize(
    # The last one's roundings all fall to one side: sums of 32 without compensation are off by more than that.
    ("size", "value"),
    [(2**17, 0.1), (2**20, 0.1), (2**21 + 5, 0.7)],
)
def test_millions_of_equal_values(backend, size, value):
    with gl.use_backend(backend):
        y = gl.AdaptiveAvgPool1d(1)(np.full((1, 1, size), value, np.float32))
    assert_within(y, np.full((1, 1, 1), np.float32(value)), MOST * 2.0**-24 * value)


@both_floors
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_long_sums_of_gradients(backend, dtype, channels_last):
    # Windows of 20,001 of 22,001 values: of 0.1 each, an input in the middle gets 2,001 shares.
    shape = (1, 22001, 4) if channels_last else (1, 1, 22001)
    x = np.zeros(shape, dtype)
    with gl.use_backend(backend):
        y, saved = ops.avg_pool_forward(x, (20001,), 1, channels_last=channels_last)
        dx = ops.avg_pool_backward(np.full_like(y, 0.1), saved)
    at = np.arange(22001)
    exact = float(dtype(0.1)) / 20001 * np.minimum(np.minimum(at + 1, 2001), 22001 - at)
    exact = np.broadcast_to(exact[:, None] if channels_last else exact, shape)
    # Its share is rounded twice, before it is added so often.
    assert_within(dx, exact, (MOST + 2) * UNIT_ROUNDOFF[np.dtype(dtype)] * exact)


@both_floors
def test_infinities_of_long_averages(backend):
    x = np.ones((1, 4, 300), np.float32)
    x[0, 0, 7], x[0, 1, 299] = np.inf, -np.inf
    x[0, 2, 0], x[0, 2, 200] = np.inf, -np.inf
    for pool in ((300,), (299,)):
        with gl.use_backend(backend):
            y, _ = ops.avg_pool_forward(x, pool, 1)
        np.testing.assert_array_equal(y[0, :, -1], [np.inf, -np.inf, np.nan if pool == (300,) else -np.inf, 1])


def test_the_reference_takes_long_windows_at_once():
    x = np.full((1, 1, 2**20), 0.1, np.float32)
    begin = time.process_time()
    ops.adaptive_avg_pool_forward(x, (1,))
    # One tap at a time this takes ten seconds.
    assert time.process_time() - begin < 2


# Input, and windows: all beyond the input; each beyond another part of it; dilated ones with taps around it; taps of a
# second axis.
HUGE = [
    ((1, 2, 10), {"kernel_size": (10**8,), "ceil_mode": True}),
    ((1, 2, 10), {"kernel_size": (10**8,), "stride": 1, "padding": 5 * 10**7}),
    ((1, 2, 10), {"kernel_size": (10**8,), "stride": 33 * 10**6, "padding": ((10**8 - 2, 10**8 - 1),), "dilation": 1}),
    ((1, 1, 12), {"kernel_size": (2**31 - 1,), "ceil_mode": True}),
    ((1, 1, 12), {"kernel_size": (10**6,), "stride": 1, "dilation": 5, "padding": ((2_500_000, 2_499_990),)}),
    ((1, 1, 3, 9), {"kernel_size": (3, 10**7), "stride": (1, 4_000_001), "padding": ((1, 0), (9_999_996, 9_999_999))}),
]


def _windows(size, kernel, stride, before, after, dilation, ceil):
    """Along one axis: first tap of each window, and numbers and places of its taps inside."""
    span = size + before + after - dilation * (kernel - 1) - 1
    count = (-(-span // stride) if ceil else span // stride) + 1
    count -= ceil and (count - 1) * stride >= size + before
    for output in range(count):
        origin = output * stride - before
        inside = [(at - origin) // dilation for at in range(size) if (at - origin) % dilation == 0 and at >= origin]
        taps = [tap for tap in inside if tap < kernel]
        counted = min(kernel, -(-(size + after - origin) // dilation))
        yield counted, taps, [origin + tap * dilation for tap in taps]


def _all_windows(shape, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False):
    rank = len(kernel_size)
    strides = kernel_size if stride is None else np.broadcast_to(stride, rank).tolist()
    pads = padding if isinstance(padding, tuple) else ((padding, padding),) * rank
    axes = [
        list(_windows(size, kernel, step, *pair, dilation, ceil_mode))
        for size, kernel, step, pair in zip(shape[2:], kernel_size, strides, pads, strict=True)
    ]
    return [len(axis) for axis in axes], itertools.product(*axes)


@both_floors
@pytest.mark.parametrize(("shape", "options"), HUGE, ids=str)
@pytest.mark.parametrize("p", [2.0, np.inf])
def test_windows_far_larger_than_the_input(backend, shape, options, p):
    x = np.random.default_rng(1).permutation(int(np.prod(shape))).reshape(shape).astype(np.float64) - 4
    outputs, windows = _all_windows(shape, **options)
    taps = float(np.prod([float(size) for size in options["kernel_size"]]))
    largest, places, average, norms = [], [], [], []
    slopes = np.zeros(shape)
    for window in windows:
        where = list(itertools.product(*(at for _, _, at in window)))
        values = np.stack([x[(slice(None), slice(None), *at)] for at in where], axis=-1)
        chosen = values.argmax(axis=-1)
        largest.append(values.max(axis=-1))
        places.append(np.array([np.ravel_multi_index(at, shape[2:]) for at in where])[chosen])
        divisor = float(np.prod([float(counted) for counted, _, _ in window]))
        average.append(values.sum(axis=-1) / divisor)
        norms.append(np.sqrt((values**2).sum(axis=-1) * taps / divisor))
        for at in where:
            slopes[(slice(None), slice(None), *at)] += 1 / divisor
    output_shape = (*shape[:2], *outputs)
    largest, places, average, norms = (
        np.stack(parts, axis=-1).reshape(output_shape) for parts in (largest, places, average, norms)
    )
    with gl.use_backend(backend):
        if p == 2:
            y, saved = ops.lp_pool_forward(x, p, **options)
            assert_within(y, norms, 1e-14 * norms)
            y, saved = ops.avg_pool_forward(x, **options)
            assert_within(y, average, 1e-14 * np.abs(average) + 1e-300)
            assert_within(ops.avg_pool_backward(np.ones_like(y), saved), slopes, 1e-14 * slopes)
            return
        y, saved = ops.max_pool_forward(x, **options)
        assert_same_bits(y, largest)
        np.testing.assert_array_equal(ops.max_pool_indices(saved), places)
        dx = ops.max_pool_backward(np.ones_like(y), saved)
        expected = np.zeros((shape[0] * shape[1], int(np.prod(shape[2:]))))
        for plane, of_plane in zip(expected, places.reshape(len(expected), -1), strict=True):
            np.add.at(plane, of_plane, 1)
        np.testing.assert_array_equal(dx.reshape(expected.shape), expected)
        y, saved = ops.lp_pool_forward(x, p, **options)
        dx = ops.lp_pool_backward(np.ones_like(y), saved)
        assert np.abs(dx).sum() == y.size


@both_floors
def test_more_taps_than_can_be_numbered(backend):
    x = normal((1, 1, 3, 4))
    with gl.use_backend(backend):
        for refused in (
            lambda: ops.max_pool_forward(x, (70000, 70000), ceil_mode=True),
            lambda: ops.lp_pool_forward(x, np.inf, (70000, 70000), ceil_mode=True),
        ):
            with pytest.raises(
                ValueError, match=r"^kernel_size must have at most 4294967296 elements, .*, got 4900000000: "
            ):
                refused()
        # 2**32 of them can; averages and finite powers have no numbers to save.
        y, saved = ops.max_pool_forward(x, (65536, 65536), ceil_mode=True)
        assert_same_bits(y, x.max(axis=(2, 3), keepdims=True))
        np.testing.assert_array_equal(ops.max_pool_indices(saved), [[[[x.argmax()]]]])
        dx = ops.max_pool_backward(np.ones_like(y), saved)
        np.testing.assert_array_equal(dx, x == x.max())
        y, saved = ops.avg_pool_forward(x, (70000, 70000), ceil_mode=True)
        assert_within(y, x.mean(axis=(2, 3), keepdims=True), 1e-15)
        assert_within(ops.avg_pool_backward(np.ones_like(y), saved), np.full(x.shape, 1 / 12), 1e-16)
        y, saved = ops.avg_pool_forward(x, (70000, 70000), padding=35000)
        assert y.shape == (1, 1, 1, 1)
        y, _ = ops.lp_pool_forward(x, 2, (70000, 70000), ceil_mode=True)
        assert_within(y, np.sqrt((x**2).mean(axis=(2, 3), keepdims=True)) * 70000, 1e-9)
