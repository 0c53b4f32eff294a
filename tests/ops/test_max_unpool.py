"""Max unpooling: values and gradients against PyTorch, equal indices, and indices that are none."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from tests.inputs import assert_same_bits, each_dtype, each_rank, integers, normal, tie_free, unchanged
from tests.torch_bridge import from_torch, to_torch

SHAPES = {1: (2, 3, 9), 2: (2, 3, 7, 8), 3: (1, 2, 5, 4, 6)}


@each_rank
@each_dtype
@pytest.mark.parametrize("arguments", [(2,), (3, 2, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("batch", [True, False])
def test_layers_are_torchs(rank, dtype, arguments, batch):
    shape = SHAPES[rank] if batch else SHAPES[rank][1:]
    x = tie_free(shape, np.float64).astype(dtype)
    pooled, indices = getattr(gl, f"MaxPool{rank}d")(*arguments, return_indices=True)(x)
    ours, theirs = getattr(gl, f"MaxUnpool{rank}d")(*arguments), getattr(torch.nn, f"MaxUnpool{rank}d")(*arguments)
    assert repr(ours) == repr(theirs)
    for size in (shape[-rank:], shape) if batch else (shape[-rank:],):
        leaf = to_torch(pooled).requires_grad_()
        expected = theirs(leaf, torch.from_numpy(indices), output_size=size)
        with unchanged(pooled, indices):
            y = ours(pooled, indices, output_size=size)
        assert_same_bits(y, from_torch(expected))
        dy = normal(y.shape, dtype, seed=1)
        expected.backward(to_torch(dy))
        for _ in range(2):
            assert_same_bits(ours.backward(dy), from_torch(leaf.grad))


@each_rank
@each_dtype
@pytest.mark.parametrize("arguments", [(2,), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_channels_last_are_the_same_values(rank, dtype, arguments, batch, backend):
    shape = SHAPES[rank] if batch else SHAPES[rank][1:]
    x = tie_free(shape, np.float64).astype(dtype)
    channels = 1 if batch else 0
    pooled, indices = getattr(gl, f"MaxPool{rank}d")(*arguments, return_indices=True)(x)
    first = getattr(gl, f"MaxUnpool{rank}d")(*arguments)
    expected = first(pooled, indices, output_size=shape[-rank:])
    dy = normal(expected.shape, dtype, seed=1)
    dx = first.backward(dy)

    def last(values):
        """A view, whose memory has the channels first."""
        return np.moveaxis(values, channels, -1)

    with gl.use_backend(backend):
        pool = getattr(gl, f"MaxPool{rank}d")(*arguments, return_indices=True, channels_last=True)
        again, places = pool(last(x))
        assert_same_bits(again, np.ascontiguousarray(last(pooled)))
        layer = getattr(gl, f"MaxUnpool{rank}d")(*arguments, channels_last=True)
        assert repr(layer) == repr(first)[:-1] + ", channels_last=True)"
        for size in (shape[-rank:], last(x).shape) if batch else (shape[-rank:],):
            with unchanged(again, places):
                y = layer(again, places, output_size=size)
            assert_same_bits(y, np.ascontiguousarray(last(expected)))
        for _ in range(2):
            assert_same_bits(layer.backward(last(dy)), np.ascontiguousarray(last(dx)))
        # Values and indices that are views.
        y = layer(last(pooled), last(indices), output_size=shape[-rank:])
        assert_same_bits(y, np.ascontiguousarray(last(expected)))


@each_dtype
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_of_equal_indices_the_last_value_counts_in_channels_last(dtype, backend):
    """Planes large enough for several threads a channel; indices outside are left out."""
    generator = np.random.default_rng(0)
    x = generator.permutation(2 * 700 * 3).reshape(2, 700, 3).astype(dtype)
    indices = generator.integers(-40, 2600, x.shape)
    with gl.use_backend(backend):
        y, saved = gl.ops.max_unpool_forward(x, indices, (2550,), channels_last=True, check=False)
        expected, slope = np.zeros((2, 2550, 3), dtype), np.zeros_like(x)
        dy = normal(y.shape, dtype)
        for n, i, c in np.ndindex(x.shape):
            if 0 <= indices[n, i, c] < 2550:
                expected[n, indices[n, i, c], c] = x[n, i, c]
                slope[n, i, c] = dy[n, indices[n, i, c], c]
        assert_same_bits(y, expected)
        assert_same_bits(gl.ops.max_unpool_backward(dy, saved), slope)
        with pytest.raises(ValueError, match=r"^Found an invalid max index: "):
            gl.ops.max_unpool_forward(x, indices, (2550,), channels_last=True)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (
            gl.MaxUnpool1d(2, padding=1),
            (1, 1, 1),
            r"kernel_size=\(2,\), .* has an output of spatial sizes \[1\], got these: .*\[0\]",
        ),
        (
            gl.MaxUnpool2d(2, 1, 1),
            (3, 1, 1, 2),
            r"spatial sizes \[1, 2\], got these: the input's sizes would be \[0, 1\]$",
        ),
        (gl.MaxUnpool2d(2, 1, 1, channels_last=True), (1, 2, 3), r"spatial sizes \[1, 2\], .* \[0, 1\]$"),
        (gl.MaxUnpool1d(1, 3, 5), (2, 3), r"spatial sizes \[3\], got these: the input's sizes would be \[-3\]$"),
    ],
)
def test_a_default_size_of_nothing_is_named(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(np.ones(shape), np.zeros(shape, np.int64))


@each_rank
def test_the_default_size_is_torchs(rank):
    x = integers((1, 1) + (3,) * rank)
    indices = np.arange(x.size).reshape(x.shape)
    arguments = (4, 3, 1)
    expected = getattr(torch.nn, f"MaxUnpool{rank}d")(*arguments)(to_torch(x), torch.from_numpy(indices))
    assert_same_bits(getattr(gl, f"MaxUnpool{rank}d")(*arguments)(x, indices), from_torch(expected))
    last = getattr(gl, f"MaxUnpool{rank}d")(*arguments, channels_last=True)
    y = last(np.moveaxis(x, 1, -1), np.moveaxis(indices, 1, -1))
    assert_same_bits(y, np.ascontiguousarray(np.moveaxis(from_torch(expected), 1, -1)))


@each_dtype
def test_of_equal_indices_the_last_value_counts(dtype):
    generator = np.random.default_rng(0)
    x = generator.permutation(2 * 3 * 90).reshape(2, 3, 90).astype(dtype)
    indices = generator.integers(0, 40, x.shape)
    y, saved = gl.ops.max_unpool_forward(x, indices, (50,))
    expected = np.zeros((2, 3, 50), dtype)
    for n, c, i in np.ndindex(x.shape):
        expected[n, c, indices[n, c, i]] = x[n, c, i]
    assert_same_bits(y, expected)
    dy = normal(y.shape, dtype)
    assert_same_bits(gl.ops.max_unpool_backward(dy, saved), np.take_along_axis(dy, indices, 2))


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("index", [-1, 4, 2**40, -(2**40)])
def test_an_index_outside_the_plane_is_refused_or_left_out(index, backend):
    x, indices = np.array([[[5.0, 6.0]]]), np.array([[[index, 3]]])
    layer = gl.MaxUnpool1d(2)
    with gl.use_backend(backend):
        message = rf"^Found an invalid max index: {index} \(output volumes are of size 4\)$"
        with pytest.raises(ValueError, match=message):
            layer(x, indices)
        assert_same_bits(layer(x, indices, check=False), np.array([[[0.0, 0, 0, 6.0]]]))
        assert_same_bits(layer.backward(np.array([[[1.0, 2, 3, 4]]])), np.array([[[0.0, 4.0]]]))


def test_indices_are_copied():
    x, indices = np.array([[[5.0]]]), np.array([[[1]]])
    _, saved = gl.ops.max_unpool_forward(x, indices, (2,))
    indices[...] = 0
    assert_same_bits(gl.ops.max_unpool_backward(np.array([[[1.0, 2.0]]]), saved), np.array([[[2.0]]]))


def test_an_empty_batch_gives_an_empty_result():
    y, saved = gl.ops.max_unpool_forward(np.zeros((0, 2, 3)), np.zeros((0, 2, 3), np.int64), (6,))
    assert_same_bits(y, np.zeros((0, 2, 6)))
    assert_same_bits(gl.ops.max_unpool_backward(y, saved), np.zeros((0, 2, 3)))


X, INDICES = np.ones((1, 2, 4)), np.zeros((1, 2, 4), np.int64)


@pytest.mark.parametrize(
    ("x", "indices", "size", "error", "message"),
    [
        (X, INDICES.astype(np.int32), None, TypeError, "^elements in indices should be type int64 but got: int32$"),
        (X, INDICES[:, :, :3], None, ValueError, "^Expected shape of indices to be same as that of the input tensor"),
        (X, INDICES, (20,), ValueError, r'^invalid output_size "\(20,\)" \(dim 0 must be between 6 and 10\)$'),
        (X, INDICES, (1, 2), ValueError, "^output_size should be a sequence containing 1 or 3 elements, but it has"),
        (X[0, 0], INDICES[0, 0], None, ValueError, "^Input to max_unpooling1d should be a 2d or 3d Tensor, but got"),
        (X[None], INDICES[None], None, ValueError, "^Input to max_unpooling1d should be a 2d or 3d Tensor, but got"),
        (X[:, :0], INDICES[:, :0], None, ValueError, "non-zero size for non-batch dimensions"),
        (X.astype(int), INDICES, None, TypeError, "^input must be float16, bfloat16, float32 or float64, got int64$"),
        (X, INDICES.tolist(), None, TypeError, "^expected a numpy.ndarray or cupy.ndarray, got list$"),
        ([1.0], INDICES, None, TypeError, "^expected a numpy.ndarray or cupy.ndarray, got list$"),
    ],
)
def test_bad_input_is_refused(x, indices, size, error, message):
    with pytest.raises(error, match=message):
        gl.MaxUnpool1d(2)(x, indices, output_size=size)


@pytest.mark.parametrize(
    ("arguments", "error"), [((0,), ValueError), ((2, 0), ValueError), ((2, 2, -1), ValueError), ((2.5,), TypeError)]
)
def test_bad_arguments_are_refused_when_the_layer_is_made(arguments, error):
    with pytest.raises(error):
        gl.MaxUnpool2d(*arguments)
