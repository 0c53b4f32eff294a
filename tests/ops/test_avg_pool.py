"""Average pooling: values and gradients against PyTorch; dilation, which PyTorch lacks, against its definition."""

import itertools

import numpy as np
import pytest

import gpu_layers as gl
from tests.gradients import transposed
from tests.inputs import (
    UNIT_ROUNDOFF,
    accumulation_dtype,
    assert_same_bits,
    assert_same_values,
    assert_within,
    each_dtype,
    each_rank,
    integers,
    normal,
    with_specials,
)
from tests.ops.pool_cases import SHAPES, TORCH_AVG_POOL, configurations, per_axis, taps_inside, window_of
from tests.torch_bridge import from_torch, to_torch

#: Which divisor; 1-D PyTorch has no divisor_override.
DIVISORS = [
    {"count_include_pad": True},
    {"count_include_pad": False},
    {"count_include_pad": True, "divisor_override": 3},
    {"count_include_pad": False, "divisor_override": -7},
]


def torch_avg_pool(x, options, dy=None):
    """Value and, where dy is given, the gradient."""
    leaf = to_torch(x).requires_grad_()
    rank = len(options["kernel_size"])
    options = {name: value for name, value in options.items() if name != "dilation"}
    if rank == 1 and "divisor_override" in options:
        # As a 2-D pooling of a plane of one row.
        for name, neutral in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
            if options[name] is not None:
                options[name] = (neutral, *per_axis(options[name], 1))
        y = TORCH_AVG_POOL[2](leaf[..., None, :], **options)[..., 0, :]
    else:
        y = TORCH_AVG_POOL[rank](leaf, **options)
    if dy is None:
        return from_torch(y), None
    y.backward(to_torch(dy))
    return from_torch(y), from_torch(leaf.grad)


@each_rank
@pytest.mark.parametrize("divisor", DIVISORS, ids=str)
def test_every_configuration_is_torchs(rank, divisor):
    fitting = 0
    for shape, options in itertools.product(SHAPES[rank], configurations(rank, dilated=False)):
        if rank == 3 and any(np.less(shape[2:], options["kernel_size"])):
            continue  # torch's 3-D kernel, alone of the three, requires a window to fit without the padding
        options = options | divisor
        x = integers(shape, high=50)
        try:
            window_of(shape, options)
        except ValueError:
            for refused, call in ((RuntimeError, torch_avg_pool), (ValueError, our_avg_pool)):
                with pytest.raises(refused, match="Output size is too small"):
                    call(x, options)
            continue
        y, saved = gl.ops.avg_pool_forward(x, **options)
        dy = normal(y.shape)
        expected_y, expected_dx = torch_avg_pool(x, options, dy)
        # A sum of integers is exact and the quotient rounded once: equal to the last bit, but for the sign of zero.
        assert_same_values(y + 0.0, expected_y + 0.0, f"{shape} {options}")
        # k quotients, each with one rounding, in sums of at most k terms in another order: gamma_k each way.
        _, bound = torch_avg_pool(x, options, np.abs(dy))
        k = 1 + np.prod(options["kernel_size"])
        dx = gl.ops.avg_pool_backward(dy, saved)
        assert_within(dx, expected_dx, 2 * k * 2.0**-53 * np.abs(bound), f"{shape} {options}")
        fitting += 1
    assert fitting > 20


def our_avg_pool(x, options):
    return gl.ops.avg_pool_forward(x, **options)


@each_rank
@each_dtype
def test_rounding_stays_within_its_bound(rank, dtype):
    # Against float64 arithmetic on the same values. With K taps: K - 1 additions and a division in the
    # accumulation dtype err by at most K u sum|x| / divisor, and rounding to the dtype by u' of the result.
    shape = SHAPES[rank][0]
    x = normal(shape, dtype)
    u, u_out = UNIT_ROUNDOFF[accumulation_dtype(dtype)], UNIT_ROUNDOFF[dtype]
    for options in list(configurations(rank, dilated=False))[::3]:
        k = np.prod(options["kernel_size"])
        y, saved = gl.ops.avg_pool_forward(x, **options)
        dy = normal(y.shape, dtype, seed=1)
        dx = gl.ops.avg_pool_backward(dy, saved)
        expected_y, expected_dx = torch_avg_pool(x.astype(np.float64), options, dy.astype(np.float64))
        absolute = torch_avg_pool(np.abs(x.astype(np.float64)), options, np.abs(dy.astype(np.float64)))
        for actual, expected, size in zip((y, dx), (expected_y, expected_dx), absolute, strict=True):
            assert actual.dtype == dtype
            # Twice, for the float64 sums that are compared with are rounded too; 1.01 for terms in u squared.
            assert_within(actual, expected, 1.01 * (2 * k * u * size + u_out * np.abs(expected)), str(options))


def test_half_types_are_summed_in_float32():
    # In float16, 2048 + 1 is 2048, and 40000 + 40000 is infinite.
    y, _ = gl.ops.avg_pool_forward(np.array([[[2048, 1, 1, 2]]], np.float16), (4,))
    assert y.item() == 513
    y, _ = gl.ops.avg_pool_forward(np.array([[[40000, 40000]]], np.float16), (2,))
    assert y.item() == 40000


@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_dilated_windows_are_the_mean_of_their_taps(count_include_pad, ceil_mode):
    options = {"kernel_size": (3, 2), "stride": (2, 3), "padding": (2, 1), "dilation": (2, 3), "ceil_mode": ceil_mode}
    x = integers((1, 1, 7, 8), high=9)
    window = window_of(x.shape, options)
    expected = np.zeros(window.output_shape)
    for i, j in np.ndindex(window.output_shape):
        rows, columns = (range(i * 2 - 2, i * 2 + 4, 2), range(j * 3 - 1, j * 3 + 5, 3))
        taps = list(itertools.product(rows, columns))
        inside = [(r, c) for r, c in taps if 0 <= r < 7 and 0 <= c < 8]
        padded = [(r, c) for r, c in taps if -2 <= r < 9 and -1 <= c < 9]
        divisor = len(padded) if count_include_pad else len(inside)
        expected[i, j] = sum(x[0, 0, r, c] for r, c in inside) / max(divisor, 1)
    y, saved = gl.ops.avg_pool_forward(x, **options, count_include_pad=count_include_pad)
    assert_same_values(y[0, 0] + 0.0, expected + 0.0)
    dy = normal(y.shape)

    def forward(batch):
        return gl.ops.avg_pool_forward(batch, **options, count_include_pad=count_include_pad)[0]

    # At most 6 quotients of size below 4 meet at an element.
    assert_within(
        gl.ops.avg_pool_backward(dy, saved), transposed(forward, x.shape[1:], dy)[None], 2 * 7 * 6 * 4 * 2.0**-53
    )


def test_a_window_with_no_tap_inside_is_zero():
    x = np.array([[[5.0]]])
    for count_include_pad, divisor_override in ((True, None), (False, None), (False, 4)):
        y, saved = gl.ops.avg_pool_forward(
            x, (2,), 1, 1, 2, count_include_pad=count_include_pad, divisor_override=divisor_override
        )
        assert_same_bits(y, np.zeros((1, 1, 1)))
        assert_same_bits(gl.ops.avg_pool_backward(np.ones((1, 1, 1)), saved), np.zeros((1, 1, 1)))


@each_rank
def test_the_sum_of_gradients_is_preserved_where_divisors_are_the_taps_inside(rank):
    checked = 0
    for shape, options in itertools.product(SHAPES[rank], configurations(rank)):
        try:
            window = window_of(shape, options)
        except ValueError:
            continue  # does not fit; tested above
        x = normal(shape)
        unpadded = options["padding"] == (0,) * rank and not options["ceil_mode"]
        for count_include_pad in (False, True) if unpadded else (False,):
            y, saved = gl.ops.avg_pool_forward(x, **options, count_include_pad=count_include_pad)
            dy = normal(y.shape)
            dx = gl.ops.avg_pool_backward(dy, saved)
            sent = dy[np.broadcast_to(taps_inside(window) > 0, y.shape)]
            # Every gradient is cut in at most 12 parts, each rounded, then added up: n terms, n u of their sizes.
            bound = (12 + dx.size) * 2.0**-53 * np.abs(sent).sum()
            assert abs(dx.sum() - sent.sum()) <= bound, f"{shape} {options}"
            checked += 1
    assert checked > 50


@each_rank
@pytest.mark.parametrize("channels_last", [False, True])
def test_unbatched_is_a_batch_of_one(rank, channels_last):
    options = {"kernel_size": (2,) * rank, "stride": 1, "padding": 1, "channels_last": channels_last}
    x = normal(SHAPES[rank][0][1:])
    x = np.ascontiguousarray(np.moveaxis(x, 0, -1)) if channels_last else x
    y, saved = gl.ops.avg_pool_forward(x, **options)
    y_batch, saved_batch = gl.ops.avg_pool_forward(x[None], **options)
    assert_same_bits(y, y_batch[0])
    dy = normal(y.shape, seed=1)
    assert_same_bits(gl.ops.avg_pool_backward(dy, saved), gl.ops.avg_pool_backward(dy[None], saved_batch)[0])


@each_dtype
def test_infinities_and_nan_spread_over_their_windows_only(dtype):
    x = with_specials((2, 3, 9, 9), dtype)
    y, saved = gl.ops.avg_pool_forward(x, (3, 3), 2, 1)
    expected, _ = torch_avg_pool(
        x.astype(np.float64), {"kernel_size": (3, 3), "stride": 2, "padding": 1, "ceil_mode": False}
    )
    # Integers over 9: one rounding to the accumulation dtype, one to the dtype.
    finite = np.isfinite(expected)
    roundings = UNIT_ROUNDOFF[accumulation_dtype(dtype)] + UNIT_ROUNDOFF[dtype]
    assert_within(y[finite], expected[finite], 1.01 * roundings * np.abs(expected[finite]))
    assert_same_values(y[~finite].astype(np.float64), expected[~finite])
    dx = gl.ops.avg_pool_backward(with_specials(y.shape, dtype, seed=1), saved)
    assert np.isnan(dx.astype(np.float64)).any()
    assert np.isfinite(dx.astype(np.float64)).any()


def test_a_long_signal_takes_no_step_per_tap_and_window():
    # A million windows of a thousand taps each: only the taps may be walked through one by one.
    x = np.ones((1, 1, 10**6), np.float32)
    window = window_of(
        x.shape, {"kernel_size": (1000,), "stride": 1, "padding": 500, "dilation": 1, "ceil_mode": False}
    )
    counts = window.divisor_counts(0, False)
    assert (counts[0], counts[500], counts[-1]) == (500, 1000, 500)
