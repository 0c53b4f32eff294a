"""Padded batches: valid positions are normalised as though nothing else were there."""

import numpy as np
import pytest
import torch

import gpu_layers as gl
from gpu_layers.runtime.backend import use_executor
from tests.inputs import (
    BFLOAT16,
    LAYOUTS,
    UNIT_ROUNDOFF,
    NoLaunch,
    assert_all_same_bits,
    assert_same_bits,
    assert_within,
    normal,
    to_channels_first,
    to_channels_last,
    unchanged,
)

# Under a hundred values of order 1 in float64, a handful of roundings each, times 1 / std of at most 10.
BOUND = 1e5 * 2.0**-53
#: Kind, shape, lengths; one sample has none.
CASES = [
    ("BatchNorm1d", (4, 3, 7), [7, 0, 3, 1]),
    ("BatchNorm2d", (3, 3, 5, 4), [[5, 4], [2, 3], [5, 0]]),
    ("BatchNorm3d", (2, 3, 3, 2, 4), [[3, 2, 4], [1, 2, 3]]),
]
each_case = pytest.mark.parametrize(("kind", "shape", "lengths"), CASES, ids=[case[0] for case in CASES])


def mask_of(shape, lengths):
    mask = np.zeros((shape[0], *shape[2:]), bool)
    for n, own in enumerate(np.reshape(lengths, (shape[0], -1))):
        mask[(n, *(slice(size) for size in own))] = True
    return mask


def rows(x, mask):
    return np.moveaxis(x, 1, -1)[mask]


def make(kind, dtype=np.float64, **options):
    dtype = "float64" if dtype == np.float64 else "float32"
    layer = getattr(gl, kind)(3, eps=0.01, dtype=dtype, **options)
    for seed, values in enumerate(layer.parameters.values()):
        values[...] = normal((3,), seed=seed)
    return layer


def torchs(x, residual, layer, training, dy):
    """The layer's function on the valid rows, and its gradients, in torch's float64."""
    theirs = torch.nn.BatchNorm1d(3, eps=0.01, dtype=torch.float64).train(training)
    state = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in layer.state_dict().items()}
    theirs.load_state_dict(state)
    leaves = [torch.from_numpy(one.astype(np.float64)).requires_grad_() for one in (x, residual)]
    y = torch.relu(theirs(leaves[0]) + leaves[1])
    y.backward(torch.from_numpy(dy.astype(np.float64)))
    return theirs, y.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)


@each_case
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_valid_positions_count(kind, shape, lengths, training, layout):
    layer, mask = make(kind, activation="relu").train(training), mask_of(shape, lengths)
    x, residual, dy = (normal(shape, seed=seed) for seed in range(3))
    theirs, y, dx, dresidual = torchs(*(rows(one, mask) for one in (x, residual)), layer, training, rows(dy, mask))
    # What is beyond may be anything.
    for one in (x, residual, dy):
        np.moveaxis(one, 1, -1)[~mask] = np.nan
    x, residual, dy = (LAYOUTS[layout](one) for one in (x, residual, dy))
    with unchanged(x, residual, dy):
        results = [layer(x, residual, lengths=lengths), *layer.backward(dy)]
    for actual, expected in zip(results, (y, dx, dresidual), strict=True):
        assert_within(rows(actual, mask), expected, BOUND)
        padding = np.moveaxis(actual, 1, -1)[~mask]
        assert_same_bits(padding, np.zeros_like(padding))
    for name, parameter in theirs.named_parameters():
        assert_within(layer.gradients[name], parameter.grad.numpy(), BOUND)
    for name, value in theirs.named_buffers():
        assert_within(layer.buffers[name], value.numpy(), BOUND)


@each_case
@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=str)
def test_a_mask_is_lengths_and_the_last_axis_is_the_second(kind, shape, lengths, backend, dtype):
    x, dy, mask = normal(shape, dtype), normal(shape, dtype, seed=1), mask_of(shape, lengths)
    with gl.use_backend(backend):
        for training in (True, False):
            first, last, masked = make(kind, dtype), make(kind, dtype, channels_last=True), make(kind, dtype)
            results = []
            for layer in (first, last, masked):
                layer.train(training)
            results.append((first(x, lengths=np.array(lengths, np.int32)), first.backward(dy)))
            results.append(
                tuple(
                    to_channels_first(one)
                    for one in (last(to_channels_last(x), lengths=lengths), last.backward(to_channels_last(dy)))
                )
            )
            results.append((masked(x, mask=mask), masked.backward(dy)))
            by_lengths, of_last, by_mask = results
            assert_all_same_bits(by_mask, by_lengths)
            # Another order of the sums of under a hundred values; gradients times gamma / std below 4.
            for one, expected in zip(of_last, by_lengths, strict=True):
                assert_within(one, expected, 1000 * 2.0**-24 + 2 * 8 * UNIT_ROUNDOFF[np.dtype(dtype)])


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32], ids=str)
def test_everything_valid_is_the_plain_layer(backend, dtype):
    x, dy = normal((4, 3, 7), dtype), normal((4, 3, 7), dtype, seed=1)
    with gl.use_backend(backend):
        padded, plain = make("BatchNorm1d", dtype), make("BatchNorm1d", dtype)
        y, expected = padded(x, lengths=[7] * 4), plain(x)
        # 28 values of order 1, times gamma / std below 4; then rounded to the dtype.
        assert_within(y, expected, 100 * 2.0**-24 + 2 * 8 * UNIT_ROUNDOFF[np.dtype(dtype)])
        assert_within(padded.backward(dy), plain.backward(dy), 1000 * 2.0**-24 + 2 * 8 * UNIT_ROUNDOFF[np.dtype(dtype)])
    assert_within(padded.buffers["running_var"], plain.buffers["running_var"], 10 * 2.0**-24)


def test_a_mask_of_samples():
    layer, plain = make("BatchNorm1d"), make("BatchNorm1d")
    x, dy = normal((5, 3)), normal((5, 3), seed=1)
    mask = np.array([True, False, True, True, False])
    y = layer(x, mask=mask)
    mask[:] = True  # the layer has what it needs
    dx = layer.backward(dy)
    assert_same_bits(y[[0, 2, 3]], plain(x[[0, 2, 3]]))
    assert_same_bits(dx[[0, 2, 3]], plain.backward(dy[[0, 2, 3]]))
    assert not y[[1, 4]].any()
    assert not dx[[1, 4]].any()


@pytest.mark.parametrize("shape", [(3, 3, 5), (0, 3, 5)])
def test_nothing_valid_is_an_empty_batch(shape):
    layer, x = make("BatchNorm1d"), np.ones(shape)
    y = layer(x, lengths=[0] * shape[0])
    assert_same_bits(y, np.zeros(shape))
    assert_same_bits(layer.backward(x), np.zeros(shape))
    assert layer.buffers["num_batches_tracked"] == 1
    assert layer.buffers["running_var"].tolist() == [1, 1, 1]


def test_switches_and_recalibration_see_valid_positions_only():
    x, lengths = normal((4, 3, 7)), [7, 0, 3, 1]
    valid = rows(x, mask_of(x.shape, lengths))
    layer = make("BatchNorm1d", momentum=1.0)
    layer.use_batch_statistics = False
    layer(x, lengths=lengths)
    assert_within(layer.buffers["running_mean"], valid.mean(axis=0), BOUND)
    assert_within(layer.buffers["running_var"], valid.var(axis=0, ddof=1), BOUND)
    for order in ("sequential", "joint"):
        layer.reset_running_stats()
        gl.recalibrate(lambda x: layer(x, lengths=lengths), [x, x], layers=[layer], order=order)
        assert_within(layer.buffers["running_var"], np.concatenate([valid, valid]).var(axis=0, ddof=1), BOUND)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lengths": [8, 1]}, ValueError, r"^lengths must be in 0 \.\. the input's size \[7\], got \[\[8\], \[1\]\]$"),
        ({"lengths": [-1, 1]}, ValueError, r"^lengths must be in 0 \.\. the input's size \[7\]"),
        ({"lengths": [3]}, ValueError, r"^lengths must have the shape \[2, 1\] or \[2\], got \[1\]$"),
        ({"lengths": [1.0, 2.0]}, TypeError, "^lengths must be integers, got float64$"),
        ({"lengths": [True, False]}, TypeError, "^lengths must be integers, got bool$"),
        ({"lengths": [[3], [1, 2]]}, ValueError, "^lengths must have the same number of sizes for every sample$"),
        ({"lengths": 3}, ValueError, r"^lengths must have the shape \[2, 1\] or \[2\], got \[\]$"),
        ({"lengths": [1, 0]}, ValueError, r"^Expected more than 1 value per channel when training, .* \[1, 3\]"),
        ({"mask": np.ones((2, 7))}, TypeError, "^mask must be boolean, got float64$"),
        ({"mask": np.ones((2, 7), np.uint8)}, TypeError, "^mask must be boolean, got uint8$"),
        ({"mask": np.ones((2, 1), bool)}, ValueError, r"^mask must have the shape \[2, 7\], got \[2, 1\]$"),
        ({"mask": np.ones((2, 3, 7), bool)}, ValueError, r"^mask must have the shape \[2, 7\], got \[2, 3, 7\]$"),
        ({"mask": [[True] * 7] * 2}, TypeError, "^expected a numpy.ndarray or cupy.ndarray, got list$"),
        ({"mask": np.ones((2, 7), bool), "lengths": [1, 2]}, ValueError, "lengths or a mask, not both"),
        ({"lengths": [7, 7], "residual": np.ones((2, 3, 6))}, ValueError, "residual must have the input.s shape"),
        ({"lengths": [7, 7], "residual": [1.0]}, TypeError, "^expected a numpy.ndarray or cupy.ndarray, got list$"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["BatchNorm1d", "GhostBatchNorm1d", "SyncBatchNorm"])
def test_bad_input_is_refused_before_anything_is_launched_and_changes_nothing(kind, options, error, message):
    layer = make(kind, **({"group_size": 2} if kind == "GhostBatchNorm1d" else {}))
    with unchanged(*layer.buffers.values()), use_executor(NoLaunch()), pytest.raises(error, match=message):
        layer(normal((2, 3, 7)), **options)
    with pytest.raises(RuntimeError, match="backward was called before forward"):
        layer.backward(normal((2, 3, 7)))


def test_lengths_need_a_spatial_axis_and_gradients_the_outputs_shape():
    layer = make("BatchNorm1d")
    with pytest.raises(ValueError, match=r"lengths need a spatial axis, got input of shape \[2, 3\]: use mask="):
        layer(normal((2, 3)), lengths=[1, 1])
    layer(normal((2, 3, 7)), lengths=[3, 2])
    for dy, error, message in (
        (normal((5, 3)), ValueError, r"dy must have the output's shape \[2, 3, 7\], got \[5, 3\]"),
        (normal((2, 3, 7), np.float32), TypeError, "dy must have the output's dtype float64, got float32"),
    ):
        with pytest.raises(error, match=message):
            layer.backward(dy)
