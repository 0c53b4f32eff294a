"""Batch norm and max pooling as one operation: the same bits as the two in a row, and nothing kept in between."""

import numpy as np
import pytest

import gpu_layers as gl
from tests.inputs import DTYPES, assert_all_same_bits, assert_same_bits, normal, to_channels_last

WINDOWS = [((3, 3), {"stride": 2, "padding": 1}), ((2, 2), {}), ((2, 3), {"dilation": (2, 1), "ceil_mode": True})]
each_window = pytest.mark.parametrize(("kernel", "window"), WINDOWS, ids=str)
each_mode = pytest.mark.parametrize("training", [True, False])


def both(x, dy, gamma, beta, kernel, window, training, channels_last, activation):
    """Output, taps and gradients of the one operation, and of the two."""
    options = {"channels_last": channels_last, "activation": activation}
    statistics = () if training else (normal(gamma.shape, gamma.dtype, seed=8), np.exp(gamma))
    name = "forward" if training else "inference"
    norm = getattr(gl.ops, f"batch_norm_{name}")
    fused = getattr(gl.ops, f"batch_norm_max_pool_{name}")
    backwards = "backward" if training else "inference_backward"
    y, saved = fused(x, *statistics, gamma, beta, kernel, **window, **options)
    one = [y, saved.pool.argmax, *getattr(gl.ops, f"batch_norm_max_pool_{backwards}")(dy(y), saved)]
    z, saved_norm = norm(x, *statistics, gamma, beta, **options)
    y, saved_pool = gl.ops.max_pool_forward(z, kernel, **window, channels_last=channels_last)
    dz = gl.ops.max_pool_backward(dy(y), saved_pool)
    return one, [y, saved_pool.argmax, *getattr(gl.ops, f"batch_norm_{backwards}")(dz, saved_norm)]


@each_window
@each_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "channels_last"), [(5, False), (16, True), (3, True)])
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_the_bits_of_the_two_in_a_row(kernel, window, training, dtype, channels, channels_last, backend):
    x = normal((3, channels, 9, 2 * 7), dtype)[..., ::2]
    x = to_channels_last(x) if channels_last else x
    gamma, beta = (normal((channels,), np.float64 if dtype == np.float64 else np.float32, seed=s) for s in (1, 2))
    with gl.use_backend(backend):
        one, two = both(
            x,
            lambda y: normal(y.shape, dtype, seed=3),
            gamma,
            beta,
            kernel,
            window,
            training,
            channels_last,
            "gelu" if kernel == (2, 2) else "relu",
        )
    assert_all_same_bits(one, two)


def test_nan_and_infinity_pass():
    x = normal((2, 2, 4, 4), np.float32)
    x[0, 0, 1, 1], x[1, 1, 2, 2] = np.nan, np.inf
    one = np.ones(2, np.float32)
    for backend in ("reference", "emulated"):
        with gl.use_backend(backend):
            y, _ = gl.ops.batch_norm_max_pool_inference(x, 0 * one, one, None, None, (2, 2), activation="relu")
        assert np.isnan(y[0, 0, 0, 0])
        assert y[1, 1, 1, 1] == np.inf
        assert np.isfinite(y).sum() == y.size - 2


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ((2, 2), "batch_norm_max_pool_forward_tiled<float, 2, 2, 0, false, true>"),
        ((1, 4), "batch_norm_max_pool_forward<float, 1>"),
    ],
)
def test_no_normalised_value_is_written_and_x_is_read_twice(kernel, name):
    x = normal((2, 8, 16, 24), np.float32)
    traces = {}
    with gl.use_backend("emulated", check=True, record=lambda kernel, trace: traces.update({kernel.name: trace})):
        y, saved = gl.ops.batch_norm_max_pool_forward(x, None, None, kernel, activation="relu")
    pooling = traces[name]
    assert pooling.total("x", "load").bytes == x.nbytes
    assert pooling.total("y", "store").bytes == y.nbytes == x.nbytes // 4
    stored = sum(trace.total(None, "store").bytes for trace in traces.values())
    assert stored < y.nbytes + saved.pool.argmax.nbytes + 4096


def test_planes_that_are_kept_are_read_once():
    x = normal((40, 8, 5, 16), np.float32)
    traces = {}
    with gl.use_backend("emulated", check=True, record=lambda kernel, trace: traces.update({kernel.name: trace})):
        y, saved = gl.ops.batch_norm_max_pool_forward(x, None, None, (3, 3), 2, 1, activation="relu")
    (trace,) = traces.values()
    # And the channel's origin, by each thread of its blocks.
    assert x.nbytes <= trace.total("x", "load").bytes <= x.nbytes + 2 * 8 * 256 * x.itemsize
    assert trace.total("y", "store").bytes == y.nbytes
    assert trace.total(None, "store").bytes < y.nbytes + saved.pool.argmax.nbytes + 4096


@pytest.mark.parametrize(("channels_last", "columns"), [(False, 16), (False, 13), (True, 13)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_special_values_and_edges_in_tiles(dtype, channels_last, columns):
    """Windows that are cut off on every side, NaN, infinities and equal values, by given statistics."""
    x = normal((2, 8, 9, columns), dtype)
    x[0, :, ::3, ::2], x[1, :, 4, 4], x[1, :, 5:7, 5] = 0.5, np.nan, -np.inf
    x[1, :, -1, -1], x[0, :, 0, 0] = np.inf, -0.0
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)) if channels_last else x
    mean, var = normal((8,), np.float32, seed=2), np.linspace(0.5, 2, 8, dtype=np.float32)
    gamma, beta = normal((8,), np.float32, seed=3), normal((8,), np.float32, seed=4)
    for activation in ("relu", "leaky_relu", None):
        for kernel, stride, padding in (((3, 3), 2, 1), ((2, 2), 2, 0)):
            results = []
            for backend in ("reference", "emulated"):
                with gl.use_backend(backend):
                    z, _ = gl.ops.batch_norm_inference(
                        x, mean, var, gamma, beta, activation=activation, channels_last=channels_last
                    )
                    window = {"stride": stride, "padding": padding, "ceil_mode": True, "channels_last": channels_last}
                    expected = gl.ops.max_pool_forward(z, kernel, **window)
                    ours = gl.ops.batch_norm_max_pool_inference(
                        x, mean, var, gamma, beta, kernel, activation=activation, **window
                    )
                    results.append((expected[0], expected[1].argmax, ours[0], ours[1].pool.argmax))
            for y, argmax, ours, own_argmax in results:
                assert_same_bits(ours, y)
                assert_same_bits(own_argmax, argmax)
            assert np.isnan(results[1][0].astype(np.float32)).any()


@each_mode
def test_empty_batch(training):
    x = np.empty((0, 3, 4, 4), np.float16)
    statistics = () if training else (np.zeros(3, np.float32), np.ones(3, np.float32))
    forward = gl.ops.batch_norm_max_pool_forward if training else gl.ops.batch_norm_max_pool_inference
    y, saved = forward(x, *statistics, None, None, (2, 2))
    assert y.shape == (0, 3, 2, 2)
    backward = gl.ops.batch_norm_max_pool_backward if training else gl.ops.batch_norm_max_pool_inference_backward
    dx, dgamma, dbeta = backward(y, saved)
    assert dx.shape == x.shape
    assert not dgamma.any()
    assert not dbeta.any()


@pytest.mark.parametrize(
    ("x", "arguments", "error", "message"),
    [
        (np.ones((3, 4, 4), np.float32), {}, ValueError, r"expected 4D input \(got 3D input\)"),
        (np.ones((2, 3, 4, 4), np.float32), {"kernel_size": 2}, TypeError, "kernel_size must be a tuple"),
        (np.ones((2, 3, 4, 4), np.float32), {"kernel_size": (5, 5)}, ValueError, "Output size is too small"),
        (np.ones((2, 3, 4, 4), np.float32), {"activation": "relu6"}, ValueError, "activation must be one of"),
        (np.ones((2, 3, 4, 4), np.float32), {"eps": 0}, ValueError, "eps"),
        (np.ones((2, 3, 4, 4), np.int32), {}, TypeError, "float16, bfloat16, float32 or float64"),
        (np.ones((1, 3, 1, 1), np.float32), {"kernel_size": (1, 1)}, ValueError, "Expected more than 1 value"),
    ],
)
def test_bad_input(x, arguments, error, message):
    with pytest.raises(error, match=message):
        gl.ops.batch_norm_max_pool_forward(x, None, None, **{"kernel_size": (2, 2)} | arguments)
