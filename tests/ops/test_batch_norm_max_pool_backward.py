"""The backward of batch norm and max pooling: the bits of its two steps, from kernels that write nothing in between."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import kernels, reference
from gpu_layers.catalogue.batch_norm_bounds import batch_norm_bounds
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.emulator import ALL_SCHEDULES
from gpu_layers.kernels.batch_norm_plan import backward_plan
from gpu_layers.runtime.limits import force_limits
from tests.inputs import BFLOAT16, assert_all_same_bits, assert_same_bits, each_dtype, normal, with_specials

each_mode = pytest.mark.parametrize("training", [True, False])
SIDE_BY_SIDE, OVERLAPPING = ((2, 2), {}), ((3, 3), {"stride": 2, "padding": 1})
# Planes of an odd height, whose rows are whole vectors; with one part a channel, and with several that wait for each
# other. Rows: likewise, with a last tile that is not full.
PLANES = [(2, 3, 9, 16), (1, 2, 129, 128)]
ROWS = [(2, 7, 9, 16), (4, 16, 17, 40)]
SHAPES = [(shape, False) for shape in PLANES] + [(shape, True) for shape in ROWS]
each_shape = pytest.mark.parametrize(("shape", "channels_last"), SHAPES, ids=str)
# Where a kernel gathers, beside the two above.
OF_ROWS = [
    SIDE_BY_SIDE,
    OVERLAPPING,
    ((3, 3), {"stride": 2, "padding": 1, "ceil_mode": True}),
    ((2, 3), {"stride": (1, 2), "padding": (1, 0)}),
    ((4, 2), {"stride": (2, 3), "padding": ((0, 3), (1, 0))}),  # padding of two sizes, and columns in no window
    ((1, 2), {"stride": (3, 1)}),
    ((3, 3), {"stride": 2, "padding": "same_upper"}),
]
IN_TWO_STEPS = [
    (PLANES[0], False, (3, 3), {"stride": 1, "padding": 1}, "relu"),  # nine windows over an element
    (ROWS[0], True, (3, 3), {"stride": 1, "padding": 1}, "relu"),
    (ROWS[0], True, (2, 2), {"dilation": 2}, "relu"),
    (ROWS[0], True, (2, 2), {}, "gelu"),
    (PLANES[0], False, (2, 2), {}, "leaky_relu"),
    ((2, 7, 9, 5), True, (2, 2), {}, "relu"),  # channels that make no vectors
    ((1, 34, 35, 8), True, (17, 16), {"stride": 9}, "relu"),  # taps of two bytes
    ((2, 3, 4, 4, 8), True, (2, 2, 2), {}, "relu"),
    (PLANES[0], False, (2, 3), {"stride": 2}, "relu"),  # a window that no kernel for planes was compiled for
    (
        PLANES[0],
        False,
        (3, 3),
        {"stride": 2, "padding": 1, "ceil_mode": True},
        "relu",
    ),  # nine outputs of sixteen inputs
    ((2, 3, 8, 10), False, (2, 2), {}, "relu"),  # vectors of two rows
]


def inputs(shape, channels_last, dtype):
    channels = shape[-1] if channels_last else shape[1]
    parameters = [normal((channels,), accumulation_dtype(dtype), seed=seed) for seed in (2, 3)]
    return normal(shape, dtype), *parameters


def pooled(arrays, kernel, window, activation="relu", channels_last=False, training=True):
    """What the forward saved, and its output's shape."""
    x, gamma, beta = arrays
    options = {"activation": activation, "channels_last": channels_last, **window}
    if training:
        y, saved = gl.ops.batch_norm_max_pool_forward(x, gamma, beta, kernel, **options)
    else:
        mean, var = normal(gamma.shape, gamma.dtype, seed=4), np.exp(gamma)
        y, saved = gl.ops.batch_norm_max_pool_inference(x, mean, var, gamma, beta, kernel, **options)
    return saved, y.shape


def one_and_two(dy, saved, training=True, **options):
    """Gradients by one operation and by its two steps; the kernels that the one launched."""
    launched = []
    name = "backward" if training else "inference_backward"
    with gl.use_backend("emulated", record=lambda kernel, trace: launched.append(kernel.name), check=True, **options):
        one = getattr(gl.ops, f"batch_norm_max_pool_{name}")(dy, saved)
    with gl.use_backend("emulated"):
        two = getattr(gl.ops, f"batch_norm_{name}")(gl.ops.max_pool_backward(dy, saved.pool), saved.norm)
    return one, two, launched


def assert_gathered(launched, *passes):
    parts = [name for name in launched if "_merge_" not in name]
    assert len(parts) == len(passes)
    for name, expected in zip(parts, passes, strict=True):
        assert name.startswith(f"batch_norm_max_pool_{expected}<"), launched


@each_shape
@each_dtype
@pytest.mark.parametrize(("kernel", "window"), [SIDE_BY_SIDE, OVERLAPPING], ids=str)
def test_one_read_gives_the_bits_of_two_steps(shape, channels_last, dtype, kernel, window):
    saved, outputs = pooled(inputs(shape, channels_last, dtype), kernel, window, channels_last=channels_last)
    dy = normal(outputs, dtype, seed=5)
    one, two, launched = one_and_two(dy, saved)
    assert_gathered(launched, "backward_persistent")
    assert_all_same_bits(one, two)


@pytest.mark.parametrize(("shape", "channels_last"), [SHAPES[1], SHAPES[3]], ids=str)
def test_several_parts_a_channel(shape, channels_last):
    assert backward_plan(shape, 4, channels_last).blocks_per_group > 1
    saved, outputs = pooled(inputs(shape, channels_last, np.float32), *OVERLAPPING, channels_last=channels_last)
    dy = normal(outputs, np.float32, seed=5)
    results = [one_and_two(dy, saved, schedule=schedule)[0] for schedule in ALL_SCHEDULES]
    for result in results[1:]:
        assert_all_same_bits(result, results[0])
    # As many groups as fit, which take the channels in turn.
    with force_limits(max_blocks=backward_plan(shape, 4, channels_last).blocks_per_group):
        assert_all_same_bits(one_and_two(dy, saved)[0], results[0])


@pytest.mark.parametrize("shape", [(20, 1, 2, 8), (5, 1, 226, 224)])
def test_threads_with_several_chunks_of_unequal_shares(shape):
    layout, (threads_x, threads_y) = (plan := backward_plan(shape, 2, False)).layout, plan.block
    chunks = [int(layout["chunk"]), int(layout["plane"] - (layout["chunks_per_plane"] - 1) * layout["chunk"])]
    assert all(chunk // 8 % threads_x for chunk in chunks)
    assert layout["chunks_per_block"] > threads_y
    saved, outputs = pooled(inputs(shape, False, BFLOAT16), *OVERLAPPING)
    one, two, launched = one_and_two(normal(outputs, BFLOAT16, seed=5), saved)
    assert_gathered(launched, "backward_persistent")
    assert_all_same_bits(one, two)


@each_shape
@each_dtype
@each_mode
@pytest.mark.parametrize("activation", ["relu", None])
def test_two_reads_give_the_bits_of_two_steps(shape, channels_last, dtype, training, activation):
    arrays = inputs(shape, channels_last, dtype)
    saved, outputs = pooled(arrays, *OVERLAPPING, activation, channels_last, training)
    # No block may be resident.
    with force_limits(max_blocks=0):
        one, two, launched = one_and_two(normal(outputs, dtype, seed=5), saved, training)
    assert_gathered(launched, "gradient_sums", "input_gradient")
    assert_all_same_bits(one, two)


@pytest.mark.parametrize(("kernel", "window"), OF_ROWS, ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
def test_any_window_of_rows_that_overlaps_with_one_other(kernel, window, dtype):
    saved, outputs = pooled(inputs(ROWS[0], True, dtype), kernel, window, channels_last=True)
    dy = normal(outputs, dtype, seed=5)
    one, two, launched = one_and_two(dy, saved)
    assert_gathered(launched, "backward_persistent")
    assert_all_same_bits(one, two)
    with force_limits(max_blocks=0):
        twice, _, launched = one_and_two(dy, saved)
    # The kernels that read twice know windows of 2x2, and of 3x3 with one before the first input, when compiled.
    if (kernel, window) in (*OF_ROWS[:3], OF_ROWS[-1]):
        assert_gathered(launched, "gradient_sums", "input_gradient")
    else:
        assert launched[0].startswith("max_pool_")
    assert_all_same_bits(twice, one)


# A band of more rows than one, with and without columns of no window; and one for which there is no room.
@pytest.mark.parametrize(("shape", "fits"), [((9, 12, 6, 8), True), ((2, 5, 5, 72), True), ((1, 4, 162, 64), False)])
@pytest.mark.parametrize(("kernel", "window"), [SIDE_BY_SIDE, OVERLAPPING], ids=str)
def test_bands_of_rows(shape, fits, kernel, window):
    saved, outputs = pooled(inputs(shape, True, BFLOAT16), kernel, window, channels_last=True)
    dy = normal(outputs, BFLOAT16, seed=5)
    with force_limits(max_blocks=0):
        results = [one_and_two(dy, saved, schedule=schedule) for schedule in ALL_SCHEDULES]
    for one, two, launched in results:
        assert launched[0].startswith("batch_norm_max_pool_gradient_sums<") == fits
        assert_all_same_bits(one, two)


@pytest.mark.parametrize(
    ("shape", "kernel", "window"), [((3, 21, 8), (3,), {"stride": 2}), ((1, 34, 35, 8), (16, 16), {"stride": 9})]
)
def test_one_axis_and_256_taps(shape, kernel, window):
    x, gamma, beta = inputs(shape, True, np.float32)
    # Every other channel ascends: of its windows the last tap is chosen.
    x = np.where(np.arange(8) % 2, x, np.arange(x.size // 8, dtype=np.float32).reshape(*shape[:-1], 1))
    saved, outputs = pooled((x, np.abs(gamma), beta), kernel, window, None, channels_last=True)
    assert saved.pool.argmax.max() == np.prod(kernel) - 1
    one, two, launched = one_and_two(normal(outputs, np.float32, seed=5), saved)
    assert_gathered(launched, "backward_persistent")
    assert_all_same_bits(one, two)


@pytest.mark.parametrize(("shape", "channels_last", "kernel", "window", "activation"), IN_TWO_STEPS)
@each_mode
def test_other_windows_take_the_two_steps(shape, channels_last, kernel, window, activation, training):
    arrays = inputs(shape, channels_last, BFLOAT16)
    saved, outputs = pooled(arrays, kernel, window, activation, channels_last, training)
    one, two, launched = one_and_two(normal(outputs, BFLOAT16, seed=5), saved, training)
    assert any(name.startswith(("max_pool_backward", "max_pool_scatter", "global_")) for name in launched)
    assert_all_same_bits(one, two)


def test_more_vectors_than_32_bits_count_take_the_two_steps():
    saved, outputs = pooled(inputs(ROWS[0], True, np.float32), *SIDE_BY_SIDE, channels_last=True)
    dy = normal(outputs, np.float32, seed=5)
    with force_limits(index64=True):
        one, two, launched = one_and_two(dy, saved)
    assert launched[0].startswith("max_pool_scatter<")
    assert_all_same_bits(one, two)
    assert_all_same_bits(one, one_and_two(dy, saved)[0])


@pytest.mark.parametrize(("kernel", "window"), [SIDE_BY_SIDE, OVERLAPPING], ids=str)
@pytest.mark.parametrize(("shape", "channels_last"), [SHAPES[0], SHAPES[2]], ids=str)
@each_dtype
def test_nan_infinity_ties_and_zeros_of_both_signs(kernel, window, shape, channels_last, dtype):
    # Every fifth value of the input NaN or infinite, all others ties.
    x, gamma, beta = inputs(shape, channels_last, dtype)
    arrays = (
        np.where(normal(shape, np.float32, seed=6) > 1, with_specials(shape, dtype, seed=7), np.sign(x)),
        gamma,
        beta,
    )
    with np.errstate(all="ignore"):
        saved, outputs = pooled(arrays, kernel, window, "relu", channels_last, training=False)
        one, two, launched = one_and_two(with_specials(outputs, dtype, seed=8), saved, training=False)
    assert_gathered(launched, "gradient_sums", "input_gradient")
    assert np.isnan(one[0]).any()
    assert np.isfinite(one[0]).any()
    # Which of two NaN a sum keeps is the processor's choice.
    one, two = ([np.where(np.isnan(values), np.nan, values) for values in gradients] for gradients in (one, two))
    assert_all_same_bits(one, two)


@pytest.mark.parametrize(("shape", "channels_last"), [SHAPES[0], SHAPES[2]], ids=str)
def test_non_contiguous_arrays(shape, channels_last):
    x, gamma, beta = inputs((*shape[:-1], 2 * shape[-1]), channels_last, np.float16)
    arrays = (x[..., ::2], *((gamma[::2], beta[::2]) if channels_last else (gamma, beta)))
    saved, outputs = pooled(arrays, *OVERLAPPING, channels_last=channels_last)
    dy = normal((*outputs[:-1], 3 * outputs[-1]), np.float16, seed=5)[..., ::3]
    kept = dy.copy()
    one, two, launched = one_and_two(dy, saved)
    assert_gathered(launched, "backward_persistent")
    assert_all_same_bits(one, two)
    assert_same_bits(dy, kept)


@each_shape
@each_dtype
def test_close_to_numpy(shape, channels_last, dtype):
    x, gamma, beta = inputs(shape, channels_last, dtype)
    saved, outputs = pooled((x, gamma, beta), *OVERLAPPING, channels_last=channels_last)
    norm, dy = saved.norm, normal(outputs, dtype, seed=5)
    arguments = (dy, saved.pool.argmax, saved.pool.window, norm)
    expected = reference.batch_norm_max_pool_backward(*arguments)
    with gl.use_backend("emulated"):
        actual = kernels.batch_norm_max_pool_backward(*arguments)
    names = ("dx", "dgamma", "dbeta")
    dz = reference.max_pool_backward(dy, saved.pool.argmax, saved.pool.window, channels_last)
    bounds = batch_norm_bounds(
        {"x": x, "dy": dz, "gamma": gamma, "beta": beta},
        {"mean": norm.mean, "inv_std": norm.inv_std, **dict(zip(names, expected, strict=True))},
        channels_last=channels_last,
        activation="relu",
    )
    for name, ours, theirs in zip(names, actual, expected, strict=True):
        assert (np.abs(ours.astype(np.float64) - theirs.astype(np.float64)) <= bounds[name]).all(), name


@each_shape
def test_what_is_read_and_written(shape, channels_last):
    saved, outputs = pooled(inputs(shape, channels_last, np.float32), *SIDE_BY_SIDE, channels_last=channels_last)
    x, argmax, dy = saved.norm.x, saved.pool.argmax, normal(outputs, np.float32, seed=5)
    traces = []

    def backward():
        with gl.use_backend("emulated", check=True, record=lambda kernel, trace: traces.append((kernel.name, trace))):
            gl.ops.batch_norm_max_pool_backward(dy, saved)

    backward()
    with force_limits(max_blocks=0):
        backward()
    (_, once), *twice = [(name, trace) for name, trace in traces if "_merge_" not in name]
    # An input of these windows is in one of them at most, so that each is looked at by as many as it has taps.
    in_windows = 4 * dy.size * 4
    for trace in (once, *(trace for _, trace in twice)):
        assert trace.total("x", "load").bytes == x.nbytes
        read = trace.total("dy", "load").bytes
        if trace is once and not channels_last:
            # Threads gather rows of whole squares, of which two blocks that share a plane may gather the same.
            assert dy.nbytes <= read <= dy.nbytes + in_windows // 16
        elif trace is once or not channels_last:
            assert read in (in_windows // 4, in_windows // 2, in_windows)
        else:
            # Blocks gather whole bands of squares, of a window each: some bands are gathered by two blocks.
            assert dy.nbytes <= read <= in_windows
        assert trace.footprints["dy"].bytes_loaded == dy.nbytes
        assert trace.footprints["argmax"].bytes_loaded == argmax.nbytes
    for trace in (once, *(trace for _, trace in twice[-1:])):
        assert trace.total("dx", "store").bytes == x.nbytes
    assert len(twice) == 2
    # The gradient of x is found tile by tile, which are nobody else's.
    assert twice[-1][1].total("dy", "load").bytes == dy.nbytes


def test_bad_gradients_are_refused():
    saved, outputs = pooled(inputs(PLANES[0], False, np.float32), *SIDE_BY_SIDE)
    for backend in ("reference", "emulated"):
        with gl.use_backend(backend):
            with pytest.raises(ValueError, match="dy must have the output's shape"):
                gl.ops.batch_norm_max_pool_backward(np.zeros(PLANES[0], np.float32), saved)
            with pytest.raises(TypeError, match="dy must have the output's dtype float32"):
                gl.ops.batch_norm_max_pool_backward(np.zeros(outputs), saved)
