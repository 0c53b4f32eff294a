"""Fractional max pooling: PyTorch's windows from given samples, this library's random numbers otherwise."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests import philox_in_ints
from tests.inputs import (
    LAYOUTS,
    accumulation_dtype,
    assert_same_bits,
    assert_within,
    each_backend,
    each_dtype,
    integers,
    normal,
    tie_free,
    to_channels_first,
    to_channels_last,
    unchanged,
    with_specials,
)

each_side = pytest.mark.parametrize("channels_last", [False, True])
# Windows that overlap, leave gaps, take a whole axis; one output; three axes.
CASES = {
    "overlapping": ((2, 3, 9, 10), (3, 3), (7, 8)),
    "gaps": ((1, 4, 20, 19), (2, 2), (5, 4)),
    "uneven": ((2, 3, 13, 11), (2, 3), (6, 5)),
    "whole axis": ((2, 2, 6, 6), (2, 6), (1, 1)),
    "3-D": ((1, 3, 7, 8, 9), (2, 2, 3), (4, 5, 1)),
}
each_case = pytest.mark.parametrize(("shape", "kernel", "outputs"), CASES.values(), ids=CASES)


def samples_for(shape, kernel, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).random((*shape[:2], len(kernel))).astype(dtype)


def by_torch(x, dy, kernel, outputs, samples):
    function = getattr(torch.nn.functional, f"fractional_max_pool{len(kernel)}d")
    leaf = torch.from_numpy(x).requires_grad_()
    y, indices = function(leaf, kernel, outputs, return_indices=True, _random_samples=torch.from_numpy(samples))
    y.backward(torch.from_numpy(dy))
    return y.detach().numpy(), indices.numpy(), leaf.grad.numpy()


@each_backend
@each_side
@each_case
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_indices_and_gradients_are_torchs(shape, kernel, outputs, channels_last, dtype, backend):
    x, samples = tie_free(shape, dtype), samples_for(shape, kernel, dtype)
    dy = integers((*shape[:2], *outputs), dtype, seed=1)  # whose sums are exact
    expected = by_torch(x, dy, kernel, outputs, samples)
    there = to_channels_last if channels_last else np.array
    back = to_channels_first if channels_last else np.array
    with gl.use_backend(backend), unchanged(x, dy, samples):
        y, saved = gl.ops.fractional_max_pool_forward(
            there(x), kernel, outputs, samples=samples, channels_last=channels_last
        )
        indices = gl.ops.fractional_max_pool_indices(saved)
        dx = gl.ops.fractional_max_pool_backward(there(dy), saved)
    for actual, wanted in zip((y, indices, dx), expected, strict=True):
        assert_same_bits(back(actual), wanted)


@each_backend
@each_dtype
@each_case
def test_random_windows_are_those_of_the_words_of_a_mask(shape, kernel, outputs, dtype, backend):
    x = with_specials(shape, dtype)
    seed, offset = 2**63 + 5, 2**40 + 3
    count = int(np.prod(shape[:2])) * len(kernel)
    words = np.array([philox_in_ints.word(seed, offset, g) for g in range(count)], np.uint64)
    samples = ((words >> np.uint64(8)).astype(np.float64) * 2.0**-24).reshape(*shape[:2], len(kernel))
    with gl.use_backend(backend):
        y, saved = gl.ops.fractional_max_pool_forward(x, kernel, outputs, seed, offset)
        given, from_samples = gl.ops.fractional_max_pool_forward(
            x, kernel, outputs, samples=samples.astype(accumulation_dtype(dtype))
        )
        drawn, _ = gl.ops.fractional_max_pool_forward(
            x, kernel, outputs, rng_state=np.array([seed, offset, 0], np.uint64)
        )
    assert_same_bits(saved.starts, from_samples.starts)
    assert y.tobytes() == given.tobytes() == drawn.tobytes()
    # Every window is inside, in order, and the last one ends with the input.
    place = 0
    for size, k, count in zip(saved.window.input_shape, saved.window.kernel, saved.window.output_shape, strict=True):
        own = saved.starts[:, place : place + count]
        place += count
        assert (np.diff(own, axis=1) >= 0).all()
        assert own.min() >= 0
        assert (own[:, -1] == size - k).all()


@each_backend
@each_dtype
def test_nan_and_ties(dtype, backend):
    x = with_specials((2, 3, 9, 8), dtype)
    with gl.use_backend(backend):
        y, saved = gl.ops.fractional_max_pool_forward(x, (3, 2), (5, 5), 1, 2)
        indices = gl.ops.fractional_max_pool_indices(saved)
    starts = saved.starts
    for plane, (n, c) in enumerate(np.ndindex(2, 3)):
        for i, j in np.ndindex(5, 5):
            h, w = starts[plane, 1 + i], starts[plane, 6 + j]
            window = x[n, c, h : h + 3, w : w + 2].astype(np.float64).reshape(-1)
            nan = np.flatnonzero(np.isnan(window))
            won = nan[-1] if nan.size else int(np.argmax(window))
            assert indices[n, c, i, j] == (h + won // 2) * 8 + w + won % 2
            assert y[n, c, i, j].tobytes() == x[n, c].reshape(-1)[indices[n, c, i, j]].tobytes()


@each_backend
@each_dtype
def test_the_sum_of_gradients_is_kept_and_sums_are_rounded_once(dtype, backend):
    shape, kernel, outputs = CASES["overlapping"]
    x, dy = normal(shape, dtype), integers((*shape[:2], *outputs), dtype, seed=1)
    with gl.use_backend(backend):
        _, saved = gl.ops.fractional_max_pool_forward(x, kernel, outputs, 1, 2)
        dx = gl.ops.fractional_max_pool_backward(dy, saved)
    assert dx.dtype == dtype
    assert dx.astype(np.float64).sum() == dy.astype(np.float64).sum()


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_and_out(layout, backend):
    x, dy = normal((2, 3, 9, 8), np.float32), normal((2, 3, 4, 5), np.float32, seed=1)
    samples = samples_for(x.shape, (2, 2), np.float32)
    with gl.use_backend(backend):
        expected, saved = gl.ops.fractional_max_pool_forward(x, (2, 2), (4, 5), samples=samples)
        dx = gl.ops.fractional_max_pool_backward(dy, saved)
        y, saved = gl.ops.fractional_max_pool_forward(layout(x), (2, 2), (4, 5), samples=layout(samples))
        assert_same_bits(y, expected)
        assert_same_bits(gl.ops.fractional_max_pool_backward(layout(dy), saved), dx)
        out, place = np.empty_like(expected), np.empty_like(x)
        assert gl.ops.fractional_max_pool_forward(x, (2, 2), (4, 5), samples=samples, out=out)[0] is out
        assert gl.ops.fractional_max_pool_backward(dy, saved, out=place) is place
    assert_same_bits(out, expected)
    assert_same_bits(place, dx)


@each_backend
def test_one_sample_and_none(backend):
    x = normal((3, 9, 8), np.float32)
    with gl.use_backend(backend):
        y, saved = gl.ops.fractional_max_pool_forward(x, (2, 2), (4, 5), 1, 2)
        batch, _ = gl.ops.fractional_max_pool_forward(x[None], (2, 2), (4, 5), 1, 2)
        assert_same_bits(y, batch[0])
        assert gl.ops.fractional_max_pool_indices(saved).shape == y.shape
        assert gl.ops.fractional_max_pool_backward(y, saved).shape == x.shape
        nothing, saved = gl.ops.fractional_max_pool_forward(np.ones((0, 3, 9, 8)), (2, 2), (4, 5), 1, 2)
        assert nothing.shape == (0, 3, 4, 5)
        assert gl.ops.fractional_max_pool_backward(nothing, saved).shape == (0, 3, 9, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_size": 2}, TypeError, "kernel_size must be a tuple, one int a spatial axis, got int"),
        ({"kernel_size": (2,)}, ValueError, "kernel_size must have 2 or 3 elements"),
        ({"kernel_size": (0, 2)}, ValueError, "kernel_size should be greater than zero"),
        ({"output_size": (4, 8)}, ValueError, "pool size 2 is too large relative to the input size 8 for 8"),
        ({"output_size": (4, 5, 6)}, ValueError, "output_size must be an int, or 2 of them"),
        ({"kernel_size": (9, 8), "output_size": (1, 1), "x": np.ones((1, 1, 40, 40))}, None, ""),
        ({"kernel_size": (17, 16), "output_size": (1, 1), "x": np.ones((1, 1, 40, 40))}, ValueError, "at most 256"),
        ({"x": np.ones((9, 8))}, ValueError, r"Expected 3D or 4D \(batch mode\) tensor"),
        ({"x": np.ones((2, 3, 9, 8), int)}, TypeError, "input must be float16, .*, got int64"),
        ({"seed": None}, TypeError, "seed must be an integer, got NoneType"),
        ({"offset": -1}, ValueError, "offset must be in 0"),
        ({"samples": np.ones((2, 3, 2))}, ValueError, "samples were given: leave seed, offset and rng_state away"),
        ({"samples": np.ones((2, 3, 3)), "seed": None, "offset": None}, ValueError, r"the shape \[2, 3, 2\]"),
        ({"samples": np.ones((2, 3, 2), np.float32), "seed": None, "offset": None}, TypeError, "must be float64"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"x": np.ones((2, 3, 9, 8)), "kernel_size": (2, 2), "output_size": (4, 5), "seed": 1, "offset": 2}
    if error is None:
        gl.ops.fractional_max_pool_forward(**(arguments | change))
        return
    with pytest.raises(error, match=message):
        gl.ops.fractional_max_pool_forward(**(arguments | change))


def test_the_layer():
    x, dy = normal((2, 3, 9, 8), np.float32), normal((2, 3, 4, 5), np.float32, seed=1)
    layer = gl.FractionalMaxPool2d(2, (4, 5), return_indices=True, generator=gl.Generator(7, 5))
    for offset in (5, 6):
        y, indices = layer(x)
        expected, saved = gl.ops.fractional_max_pool_forward(x, (2, 2), (4, 5), 7, offset)
        assert_same_bits(y, expected)
        assert_same_bits(indices, gl.ops.fractional_max_pool_indices(saved))
        assert_same_bits(layer.backward(dy), gl.ops.fractional_max_pool_backward(dy, saved))
    samples = samples_for(x.shape, (2, 2), np.float32)
    given, _ = layer(x, samples=samples)
    assert_same_bits(given, gl.ops.fractional_max_pool_forward(x, (2, 2), (4, 5), samples=samples)[0])
    assert layer.generator.offset == 7
    ratio = gl.FractionalMaxPool3d(2, output_ratio=(0.5, 0.6, 0.7))
    assert ratio(np.ones((1, 2, 9, 8, 10), np.float32)).shape == (1, 2, 4, 4, 7)
    # PyTorch's, of all sizes and ratios.
    mean = np.mean([gl.FractionalMaxPool2d(2, output_ratio=0.7)(x).mean() for _ in range(20)])
    theirs = torch.nn.FractionalMaxPool2d(2, output_ratio=0.7)
    assert_within(np.array(mean), np.mean([theirs(torch.from_numpy(x)).mean() for _ in range(20)]), 0.1)


def test_a_checkpoint_draws_the_same_windows_again():
    x = normal((2, 3, 9, 8), np.float32)
    layers = [gl.Sequential(gl.FractionalMaxPool2d(2, (4, 5), generator=gl.Generator(7))) for _ in range(2)]
    plain, again = layers[0], gl.checkpoint(layers[1])
    y = plain(x)
    assert_same_bits(again(x), y)
    assert_same_bits(again.backward(y), plain.backward(y))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "^FractionalMaxPool2d requires specifying either an output size, or a pooling ratio$"),
        ({"output_size": 3, "output_ratio": 0.5}, ValueError, "only one of output_size and output_ratio may be"),
        ({"output_ratio": 1.5}, ValueError, r"output_ratio must be between 0 and 1 \(got 1.5\)"),
        ({"output_ratio": (0.5, 0.5, 0.5)}, ValueError, "output_ratio must be a number, or 2 of them"),
        ({"output_ratio": "0.5"}, TypeError, "output_ratio must be a number, got str"),
        ({"output_size": 0}, ValueError, "output_size should be greater than zero"),
        ({"output_size": 3, "generator": 1}, TypeError, "generator must be a gpu_layers.Generator, got int"),
    ],
)
def test_bad_layers_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        gl.FractionalMaxPool2d(2, **arguments)


def test_repr():
    assert repr(gl.FractionalMaxPool2d(2, 3)) == "FractionalMaxPool2d(kernel_size=2, output_size=3)"
    layer = gl.FractionalMaxPool3d(2, output_ratio=0.5, channels_last=True)
    assert repr(layer) == "FractionalMaxPool3d(kernel_size=2, output_ratio=0.5, channels_last=True)"
