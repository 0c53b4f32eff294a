"""The operations that are measured: an entry each. A new one needs no code elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, wraps
from itertools import pairwise
from typing import Any

import numpy as np

from gpu_layers import ops
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.distributed.communicator import SingleProcess
from gpu_layers.layers.batch_norm import BatchNorm2d
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.cuda import array_module
from gpu_layers.verification import floors
from gpu_layers.verification.inputs import launched_nowhere
from profiling.operation import (
    BACKWARD,
    FORWARD,
    LARGE_IMAGES,
    LARGE_ROWS,
    SINGLE_IMAGE,
    SMALL_IMAGES,
    SMALL_ROWS,
    Arrays,
    Operation,
    Shape,
    Sizes,
)

_IMAGES = (*LARGE_IMAGES, *SMALL_IMAGES, *SINGLE_IMAGE)
_P, _SEED, _OFFSET, _EPS = 0.5, 1, 2, 1e-5


def _each(of_pass: Any, **options: Any) -> dict[str, Any]:
    """A floor that depends on the pass."""
    return {
        direction: lambda s, direction=direction: of_pass(s, direction, **options) for direction in (FORWARD, BACKWARD)
    }


def _both(forward: Any, backward: Any | None = None) -> dict[str, Any]:
    return {FORWARD: forward, BACKWARD: backward or forward}


def _channel_axis(x: Any, channels_last: bool) -> int:
    return x.ndim - 1 if channels_last else 1


def _other_axes(x: Any, channels_last: bool) -> tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != _channel_axis(x, channels_last))


def _along_channels(values: Any, x: Any, channels_last: bool) -> Any:
    return values.reshape([-1 if axis == _channel_axis(x, channels_last) else 1 for axis in range(x.ndim)])


# Dropout


@cache
def _kept(decisions: int, offset: int) -> float:
    with use_backend("reference"):
        return float(ops.dropout_mask(decisions, _P, _SEED, offset).mean())


def _kept_together(axes: int, offset: int) -> dict[str, Any]:
    """What is kept, and the floor, where elements with the same indices on the first axes are dropped together."""

    def kept(shape: Shape) -> float:
        return _kept(math.prod(shape[:axes]), offset)

    return {"kept": kept, "floor": _both(lambda s: floors.dropout(s, kept(s.shape)))}


def _dropout_jax(jax: Any, arrays: Arrays, channels_last: bool) -> Any:
    x = arrays["x"]
    kept = jax.random.bernoulli(jax.random.PRNGKey(_SEED), 1 - _P, x.shape)
    return jax.numpy.where(kept, x / (1 - _P), 0).astype(x.dtype)


DROPOUT = Operation(
    name="dropout",
    shapes=(*LARGE_ROWS, *LARGE_IMAGES, *SMALL_IMAGES, *SMALL_ROWS, *SINGLE_IMAGE),
    forward=lambda a, last: ops.dropout_forward(a["x"], _P, _SEED, _OFFSET, start=a["start"]),
    backward=ops.dropout_backward,
    floor=_both(floors.dropout),
    torch_bytes=_both(lambda s: s.elements(2) + s.inputs),  # and a mask of one byte
    torch=lambda F, t: F.dropout(t["x"], _P, training=True),  # noqa: N803 - its usual name
    expression=lambda xp, a, last: xp.where(xp.random.random(a["x"].shape) >= _P, a["x"] / (1 - _P), 0),
    jax=_dropout_jax,
    independent="elements",
    is_random=True,
)

CHANNEL_DROPOUT = Operation(
    name="channel_dropout",
    shapes=_IMAGES,
    # A decision for each pair of sample and channel: that is what `start` counts here.
    forward=lambda a, last: ops.dropout_forward(
        a["x"], _P, _SEED, _OFFSET, start=a["start"] // math.prod(a["x"].shape[2:]), mask_axes=2
    ),
    backward=ops.dropout_backward,
    **_kept_together(2, _OFFSET),
    torch_bytes=_both(lambda s: s.elements(2)),
    torch=lambda F, t: F.dropout2d(t["x"], _P, training=True),  # noqa: N803
    expression=lambda xp, a, last: xp.where(xp.random.random((*a["x"].shape[:2], 1, 1)) >= _P, a["x"] / (1 - _P), 0),
    is_random=True,
)

ALPHA_DROPOUT = Operation(
    name="alpha_dropout",
    shapes=(*LARGE_ROWS, *SMALL_ROWS),
    forward=lambda a, last: ops.alpha_dropout_forward(a["x"], _P, _SEED, _OFFSET, start=a["start"]),
    backward=ops.dropout_backward,
    floor=_both(floors.dropout),
    # Draws noise (1), makes shift (6) and scale (2) of it, multiplies (3) and adds (3); the backward multiplies.
    torch_bytes={FORWARD: lambda s: s.elements(15), BACKWARD: lambda s: s.elements(3)},
    torch=lambda F, t: F.alpha_dropout(t["x"], _P, training=True),  # noqa: N803
    independent="elements",
    is_random=True,
)

SHARED_DROPOUT = Operation(
    name="shared_dropout",
    shapes=LARGE_IMAGES,
    # All channels of a place in a sample, as all steps of time elsewhere.
    forward=lambda a, last: ops.dropout_forward(
        a["x"], _P, _SEED, _OFFSET, start=a["start"] // a["x"].shape[1], shared_axes=(1,)
    ),
    backward=ops.dropout_backward,
    floor=_both(floors.dropout),
    torch_bytes=_both(lambda s: s.elements(2)),
    torch=lambda F, t: t["x"] * F.dropout(t["x"].new_ones((len(t["x"]), 1, *t["x"].shape[2:])), _P, training=True),  # noqa: N803
    expression=lambda xp, a, last: a["x"] * ((xp.random.random((len(a["x"]), 1, *a["x"].shape[2:])) >= _P) / (1 - _P)),
    is_random=True,
)

# Of a half of the first 32, 64 and 256 samples.
_HALF = 288

DROP_PATH = Operation(
    name="drop_path",
    shapes=(*LARGE_IMAGES, *SMALL_IMAGES[:1]),
    forward=lambda a, last: ops.dropout_forward(
        a["x"], _P, _SEED, _HALF, start=a["start"] // math.prod(a["x"].shape[1:]), mask_axes=1
    ),
    backward=ops.dropout_backward,
    **_kept_together(1, _HALF),
    torch_bytes=_both(lambda s: s.elements(2)),
    torch=lambda F, t: t["x"] * F.dropout(t["x"].new_ones((len(t["x"]), 1, 1, 1)), _P, training=True),  # noqa: N803
    expression=lambda xp, a, last: a["x"] * ((xp.random.random((len(a["x"]), 1, 1, 1)) >= _P) / (1 - _P)),
    is_random=True,
)

FEATURE_ALPHA_DROPOUT = Operation(
    name="feature_alpha_dropout",
    shapes=LARGE_IMAGES[:1],
    forward=lambda a, last: ops.alpha_dropout_forward(
        a["x"], _P, _SEED, _OFFSET, start=a["start"] // math.prod(a["x"].shape[2:]), mask_axes=2
    ),
    backward=ops.dropout_backward,
    **_kept_together(2, _OFFSET),
    # The noise is of channels: what is left is to multiply and to add.
    torch_bytes={FORWARD: lambda s: s.elements(4), BACKWARD: lambda s: s.elements(2)},
    torch=lambda F, t: F.feature_alpha_dropout(t["x"], _P, training=True),  # noqa: N803
    is_random=True,
)


@cache
def _numbers(xp: Any, first: int, count: int) -> Any:
    return xp.arange(first, first + count, dtype=np.int64)


def _by_sample(arrays: Arrays) -> dict[str, Any]:
    x = arrays["x"]
    return {"sample_ids": _numbers(array_module(x), arrays["start"] // math.prod(x.shape[1:]), len(x))}


SAMPLE_DROPOUT = Operation(
    name="sample_dropout",
    shapes=LARGE_ROWS,
    forward=lambda a, last: ops.dropout_forward(a["x"], _P, _SEED, _OFFSET, **_by_sample(a)),
    backward=ops.dropout_backward,
    floor=_both(floors.dropout),
    torch_bytes=_both(lambda s: s.elements(2) + s.inputs),  # of a dropout that knows no samples
    is_random=True,
)

_PASSES = 8

DROPOUT_MOMENTS = Operation(
    name="dropout_moments",
    shapes=LARGE_ROWS,
    forward=lambda a, last: (
        ops.dropout_moments(a["x"], _P, _SEED, _OFFSET, passes=_PASSES, start=a["start"])[0],
        None,
    ),
    backward=None,
    floor={FORWARD: floors.dropout_moments},
    # The passes, their copies in float32, and Welford's five operations on three arrays each.
    torch_bytes={FORWARD: lambda s: _PASSES * (s.elements(3) + s.inputs + 16 * max(s.itemsize, 4) * s.inputs)},
    independent="elements",
    is_random=True,
    is_training=False,
)

# Activations

RELU = Operation(
    name="relu",
    shapes=(*LARGE_ROWS, *LARGE_IMAGES, *SMALL_IMAGES, *SMALL_ROWS, *SINGLE_IMAGE),
    forward=lambda a, last: ops.relu_forward(a["x"]),
    backward=ops.relu_backward,
    floor=_both(floors.relu),
    torch_bytes={FORWARD: lambda s: s.elements(2), BACKWARD: lambda s: s.elements(3)},
    torch=lambda F, t: F.relu(t["x"]),  # noqa: N803
    expression=lambda xp, a, last: xp.maximum(a["x"], 0),
    gradient=lambda xp, a, last: xp.where(a["x"] > 0, a["dy"], 0),
    jax=lambda jax, a, last: jax.nn.relu(a["x"]),
    independent="elements",
)

ACTIVATION_DROPOUT = Operation(
    name="activation_dropout",
    shapes=(*LARGE_ROWS, *LARGE_IMAGES, *SMALL_IMAGES, *SMALL_ROWS),
    forward=lambda a, last: ops.activation_dropout_forward(a["x"], "gelu", _P, _SEED, _OFFSET, start=a["start"]),
    backward=ops.activation_dropout_backward,
    floor=_each(floors.activation_dropout, saves_bits=False),
    # Two kernels each way, and the mask.
    torch_bytes={FORWARD: lambda s: s.elements(4) + s.inputs, BACKWARD: lambda s: s.elements(5) + s.inputs},
    torch=lambda F, t: F.dropout(F.gelu(t["x"]), _P, training=True),  # noqa: N803
    jax=lambda jax, a, last: _dropout_jax(jax, {"x": jax.nn.gelu(a["x"], approximate=False)}, last),
    independent="elements",
    is_random=True,
)

DROPOUT_ACTIVATION = replace(
    ACTIVATION_DROPOUT,
    name="dropout_activation",
    shapes=LARGE_ROWS,
    forward=lambda a, last: ops.activation_dropout_forward(
        a["x"], "gelu", _P, _SEED, _OFFSET, order="before", start=a["start"]
    ),
    torch=lambda F, t: F.gelu(F.dropout(t["x"], _P, training=True)),  # noqa: N803
    jax=lambda jax, a, last: jax.nn.gelu(_dropout_jax(jax, a, last), approximate=False),
)

RELU_DROPOUT = replace(
    ACTIVATION_DROPOUT,
    name="relu_dropout",
    shapes=(*LARGE_ROWS, *SMALL_ROWS),
    forward=lambda a, last: ops.activation_dropout_forward(a["x"], "relu", _P, _SEED, _OFFSET, start=a["start"]),
    floor=_each(floors.activation_dropout, saves_bits=True),
    torch=lambda F, t: F.dropout(F.relu(t["x"]), _P, training=True),  # noqa: N803
    jax=lambda jax, a, last: _dropout_jax(jax, {"x": jax.nn.relu(a["x"])}, last),
)


def _dropout_add(a: Arrays, activation: str | None, **options: Any) -> Any:
    return ops.dropout_add_forward(
        a["x"], a["residual"], _P, _SEED, _OFFSET, bias=a["beta"], activation=activation, start=a["start"], **options
    )


@wraps(ops.dropout_add_backward)
def _dropout_add_backward(dy: Any, saved: Any) -> Any:
    # That of the bias is no sum over a part of the rows, which is what is looked at.
    return ops.dropout_add_backward(dy, saved)[0]


DROPOUT_ADD = Operation(
    name="dropout_add",
    shapes=(*LARGE_ROWS, *SMALL_ROWS),
    forward=lambda a, last: _dropout_add(a, None),
    backward=_dropout_add_backward,
    floor=_each(floors.dropout_add, activation=None, bias=True),
    # Three kernels forward, and the mask; backward dropout and the sums.
    torch_bytes={FORWARD: lambda s: s.elements(7) + s.inputs, BACKWARD: lambda s: s.elements(3) + s.inputs},
    torch=lambda F, t: t["residual"] + F.dropout(t["x"] + t["beta"].to(t["x"].dtype), _P, training=True),  # noqa: N803
    jax=lambda jax, a, last: a["residual"] + _dropout_jax(jax, {"x": (a["x"] + a["beta"]).astype(a["x"].dtype)}, last),
    per_channel=("beta",),
    like_x=("residual",),
    is_random=True,
)

GELU_DROPOUT_ADD = replace(
    DROPOUT_ADD,
    name="gelu_dropout_add",
    shapes=LARGE_ROWS,
    forward=lambda a, last: _dropout_add(a, "gelu"),
    floor=_each(floors.dropout_add, activation="gelu", bias=True),
    torch_bytes={FORWARD: lambda s: s.elements(9) + s.inputs, BACKWARD: lambda s: s.elements(6) + s.inputs},
    torch=lambda F, t: t["residual"] + F.dropout(F.gelu(t["x"] + t["beta"].to(t["x"].dtype)), _P, training=True),  # noqa: N803
    jax=lambda jax, a, last: (
        a["residual"] + _dropout_jax(jax, {"x": jax.nn.gelu(a["x"] + a["beta"], approximate=False)}, last)
    ),
)

# Batch normalisation


def _batch_norm_expression(xp: Any, arrays: Arrays, channels_last: bool) -> Any:
    x = arrays["x"].astype(xp.result_type(arrays["x"], arrays["gamma"]))
    axes = _other_axes(x, channels_last)
    mean, var = (arrays.get(name) for name in ("mean", "var"))
    if mean is None:
        mean, var = x.mean(axes), x.var(axes)
    gamma, beta, mean, var = (
        _along_channels(v, x, channels_last) for v in (arrays["gamma"], arrays["beta"], mean, var)
    )
    return ((x - mean) / xp.sqrt(var + _EPS) * gamma + beta).astype(arrays["x"].dtype)


def _batch_norm_gradient(xp: Any, arrays: Arrays, channels_last: bool) -> Any:
    x, dy = (arrays[name].astype(xp.result_type(arrays[name], arrays["gamma"])) for name in ("x", "dy"))
    axes = _other_axes(x, channels_last)
    gamma = _along_channels(arrays["gamma"], x, channels_last)
    inv_std = 1 / xp.sqrt(x.var(axes, keepdims=True) + _EPS)
    xhat = (x - x.mean(axes, keepdims=True)) * inv_std
    inner = dy - dy.mean(axes, keepdims=True) - xhat * (dy * xhat).mean(axes, keepdims=True)
    return (gamma * inv_std * inner).astype(arrays["x"].dtype)


BATCH_NORM = Operation(
    name="batch_norm",
    shapes=(*_IMAGES[:4], *SMALL_ROWS),
    forward=lambda a, last: ops.batch_norm_forward(a["x"], a["gamma"], a["beta"], eps=_EPS, channels_last=last),
    backward=ops.batch_norm_backward,
    floor=_each(floors.batch_norm, affine=True),
    # Two passes over x, and over dy and x.
    torch_bytes=_each(floors.batch_norm, reads=2, affine=True),
    torch=lambda F, t: F.batch_norm(t["x"], None, None, t["gamma"], t["beta"], True, 0.1, _EPS),  # noqa: N803
    expression=_batch_norm_expression,
    gradient=_batch_norm_gradient,
    jax=lambda jax, a, last: _batch_norm_expression(jax.numpy, a, last),
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)

BATCH_NORM_INFERENCE = Operation(
    name="batch_norm_inference",
    shapes=(*_IMAGES[:4], *SMALL_ROWS),
    forward=lambda a, last: ops.batch_norm_inference(
        a["x"], a["mean"], a["var"], a["gamma"], a["beta"], eps=_EPS, channels_last=last
    ),
    backward=None,
    floor={FORWARD: lambda s: floors.batch_norm_inference(s, affine=True)},
    torch_bytes={FORWARD: lambda s: floors.batch_norm_inference(s, affine=True)},
    torch=lambda F, t: F.batch_norm(t["x"], t["mean"], t["var"], t["gamma"], t["beta"], False, 0.1, _EPS),  # noqa: N803
    expression=_batch_norm_expression,
    jax=lambda jax, a, last: _batch_norm_expression(jax.numpy, a, last),
    layouts=(False, True),
    per_channel=("gamma", "beta", "mean", "var"),
    independent="channels",
    is_training=False,
)


def _sum_expression(xp: Any, arrays: Arrays, channels_last: bool) -> Any:
    z = _batch_norm_expression(xp, arrays, channels_last) + arrays["residual"]
    return xp.where(z > 0, z, xp.zeros_like(z))


BATCH_NORM_SUM_RELU = Operation(
    name="batch_norm_sum_relu",
    shapes=(*_IMAGES[:4], *SMALL_ROWS),
    forward=lambda a, last: ops.batch_norm_forward(
        a["x"], a["gamma"], a["beta"], eps=_EPS, residual=a["residual"], activation="relu", channels_last=last
    ),
    backward=ops.batch_norm_backward,
    floor=_each(floors.batch_norm, residual=True, affine=True),
    # Batch norm, a sum, and ReLU: 3, 3 and 2; backwards 3 of ReLU, whose gradient is the residual's too, and 5.
    torch_bytes={FORWARD: lambda s: s.elements(8), BACKWARD: lambda s: s.elements(8)},
    torch=lambda F, t: F.relu(  # noqa: N803
        F.batch_norm(t["x"], None, None, t["gamma"], t["beta"], True, 0.1, _EPS) + t["residual"]
    ),
    expression=_sum_expression,
    jax=lambda jax, a, last: _sum_expression(jax.numpy, a, last),
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    like_x=("residual",),
    independent="channels",
)

# Samples of a group, but for the last one: 64, 128 and 32 samples are 3, 6 and 2 groups.
_GROUP = 24


def _groups(samples: int) -> tuple[int, ...]:
    size = max(1, min(_GROUP, samples - 1))
    return (*range(0, samples, size), samples)


def _ghost_floor(s: Sizes, direction: str) -> int:
    image = s.inputs // s.shape[0]
    sizes = [stop - start for start, stop in pairwise(_groups(s.shape[0]))]
    groups = [Sizes(size * image, size * image, s.itemsize, (size, *s.shape[1:])) for size in sizes]
    return floors.ghost_batch_norm([(group, 1) for group in groups], direction, affine=True)


GHOST_BATCH_NORM = Operation(
    name="ghost_batch_norm",
    shapes=(LARGE_IMAGES[0], *SMALL_IMAGES),
    forward=lambda a, last: ops.ghost_batch_norm_forward(
        a["x"], a["gamma"], a["beta"], bounds=_groups(len(a["x"])), eps=_EPS, channels_last=last
    ),
    backward=ops.ghost_batch_norm_backward,
    floor=_each(_ghost_floor),
    # In chunks, of which the results are put together by a copy.
    torch_bytes={FORWARD: lambda s: s.elements(3 + 2), BACKWARD: lambda s: s.elements(5 + 2)},
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)

SYNC_BATCH_NORM = Operation(
    name="sync_batch_norm",
    shapes=(LARGE_IMAGES[0], *SMALL_IMAGES, *SMALL_ROWS),
    forward=lambda a, last: ops.sync_batch_norm_forward(
        a["x"], a["gamma"], a["beta"], SingleProcess(), eps=_EPS, channels_last=last
    ),
    backward=ops.sync_batch_norm_backward,
    # All of one process's work.
    floor=_each(floors.sync_batch_norm, affine=True),
    torch_bytes=_each(floors.sync_batch_norm, affine=True),
    # What PyTorch's SyncBatchNorm runs where there is one process.
    torch=lambda F, t: F.batch_norm(t["x"], None, None, t["gamma"], t["beta"], True, 0.1, _EPS),  # noqa: N803
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)


def _lengths(shape: Shape, channels_last: bool) -> list[tuple[int, int]]:
    """Every other sample has all rows, the others half of them: three quarters are valid."""
    rows, columns = shape[1:3] if channels_last else shape[2:]
    return [(rows // 2 if sample % 2 else rows, columns) for sample in range(shape[0])]


def _valid_part(shape: Shape) -> float:
    """What part of a padded batch is valid."""
    samples, rows, columns = shape[0], *shape[2:]
    return sum(height * width for height, width in _lengths(shape, False)) / (samples * rows * columns)


def _padded_forward(arrays: Arrays, channels_last: bool) -> tuple[Any, BatchNorm2d]:
    x, gamma = arrays["x"], arrays["gamma"]
    layer = BatchNorm2d(gamma.size, _EPS, track_running_stats=False, channels_last=channels_last, dtype=gamma.dtype)
    layer.parameters = {"weight": gamma, "bias": arrays["beta"]}
    return layer(x, lengths=_lengths(x.shape, channels_last)), layer


def _padded_backward(dy: Any, layer: BatchNorm2d) -> tuple[Any, ...]:
    return layer.backward(dy), layer.gradients["weight"], layer.gradients["bias"]


def _finding_and_packing(s: Sizes) -> int:
    """Bytes of a mask, written and read, and of the valid positions' numbers, besides those of packing."""
    return 2 * s.positions + _numbers_of_positions(s) + _packing(s)


def _packing(s: Sizes) -> int:
    """Bytes of gathering the valid values of an array into rows, and of scattering rows into one of zeros."""
    valid, index = s.elements(3) // 4, _numbers_of_positions(s)
    return (index + 2 * valid) + (index + s.elements(1) + 2 * valid)


def _numbers_of_positions(s: Sizes) -> int:
    return 3 * 8 * (3 * s.positions // 4)


PADDED_BATCH_NORM = Operation(
    name="padded_batch_norm",
    shapes=(LARGE_IMAGES[0], SMALL_IMAGES[0]),
    forward=_padded_forward,
    backward=_padded_backward,
    floor=_each(lambda s, direction: floors.padded_batch_norm(s, direction, 3 * s.inputs // 4, affine=True)),
    kept=_valid_part,
    # Its batch norm is one of rows, into which valid values are packed, and from which they are unpacked.
    torch_bytes={
        FORWARD: lambda s: _finding_and_packing(s) + s.elements(3 * 3) // 4,
        BACKWARD: lambda s: _packing(s) + s.elements(3 * 5) // 4,
    },
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)

# Pooling: the windows of ResNet's stem and of spatial pyramids for the maximum, and halving for the mean.

_MAX_WINDOW, _PYRAMID_WINDOW, _AVG_WINDOW = (3, 2, 1), (5, 1, 2), (2, 2, 0)  # kernel, stride, padding


def _pooled(window: tuple[int, int, int]) -> Any:
    kernel, stride, padding = window

    def output_shape(shape: Shape) -> Shape:
        return (*shape[:2], *((size + 2 * padding - kernel) // stride + 1 for size in shape[2:]))

    return output_shape


def _taps(xp: Any, x: Any, window: tuple[int, int, int], channels_last: bool, fill: float) -> list[Any]:
    """For each tap of the window, what it sees at every output: a strided view of the padded array."""
    kernel, stride, padding = window
    first = 1 if channels_last else 2
    pads = [(padding, padding) if axis in (first, first + 1) else (0, 0) for axis in range(4)]
    padded = xp.pad(x, pads, constant_values=fill)
    rows, columns = ((x.shape[first + i] + 2 * padding - kernel) // stride + 1 for i in range(2))
    views = []
    for row in range(kernel):
        for column in range(kernel):
            place = (
                slice(row, row + stride * (rows - 1) + 1, stride),
                slice(column, column + stride * (columns - 1) + 1, stride),
            )
            views.append(padded[(slice(None),) * first + place])
    return views


def _max_pool_expression(window: tuple[int, int, int]) -> Any:
    def expression(xp: Any, arrays: Arrays, channels_last: bool) -> Any:
        first, *others = _taps(xp, arrays["x"], window, channels_last, -math.inf)
        for tap in others:
            first = xp.maximum(first, tap)
        return first

    return expression


def _avg_pool_expression(xp: Any, arrays: Arrays, channels_last: bool) -> Any:
    return sum(_taps(xp, arrays["x"], _AVG_WINDOW, channels_last, 0.0)) / _AVG_WINDOW[0] ** 2


def _reduce_window(jax: Any, x: Any, start: float, by: Any, window: tuple[int, int, int], channels_last: bool) -> Any:
    kernel, stride, padding = window

    def spatial(value: Any, rest: Any) -> tuple:
        return (rest, value, value, rest) if channels_last else (rest, rest, value, value)

    pads = spatial((padding, padding), (0, 0))
    return jax.lax.reduce_window(x, x.dtype.type(start), by, spatial(kernel, 1), spatial(stride, 1), pads)


def _pool_bytes(extra: int) -> Any:
    """x and y, and this many bytes of state for each output."""
    return lambda s: s.elements(1, 1) + extra * s.outputs


def _max_pool(name: str, window: tuple[int, int, int], shapes: tuple[Shape, ...]) -> Operation:
    kernel, stride, padding = window
    return Operation(
        name=name,
        shapes=shapes,
        forward=lambda a, last: ops.max_pool_forward(a["x"], (kernel, kernel), stride, padding, channels_last=last),
        backward=ops.max_pool_backward,
        floor=_both(lambda s: floors.pool(s, 1)),
        torch_bytes=_both(_pool_bytes(8)),
        torch=lambda F, t: F.max_pool2d(t["x"], *window),  # noqa: N803
        expression=_max_pool_expression(window),
        jax=lambda jax, a, last: _reduce_window(jax, a["x"], -math.inf, jax.lax.max, window, last),
        output_shape=_pooled(window),
        layouts=(False, True),
    )


MAX_POOL = _max_pool("max_pool", _MAX_WINDOW, _IMAGES)
PYRAMID_MAX_POOL = _max_pool("pyramid_max_pool", _PYRAMID_WINDOW, ((64, 256, 40, 40), (64, 512, 20, 20)))

AVG_POOL = Operation(
    name="avg_pool",
    shapes=_IMAGES,
    forward=lambda a, last: ops.avg_pool_forward(a["x"], (2, 2), channels_last=last),
    backward=ops.avg_pool_backward,
    # Forward reads what lies in a window: of an odd plane not the last row and column.
    floor={FORWARD: lambda s: floors.pool(s, seen=4 * s.outputs), BACKWARD: floors.pool},
    torch_bytes={FORWARD: lambda s: s.elements(0, 5), BACKWARD: _pool_bytes(0)},
    torch=lambda F, t: F.avg_pool2d(t["x"], *_AVG_WINDOW),  # noqa: N803
    expression=_avg_pool_expression,
    jax=lambda jax, a, last: _reduce_window(jax, a["x"], 0.0, jax.lax.add, _AVG_WINDOW, last) / _AVG_WINDOW[0] ** 2,
    output_shape=_pooled(_AVG_WINDOW),
    layouts=(False, True),
)

GLOBAL_AVG_POOL = Operation(
    name="global_avg_pool",
    shapes=_IMAGES,
    forward=lambda a, last: ops.adaptive_avg_pool_forward(a["x"], (1, 1), channels_last=last),
    backward=ops.avg_pool_backward,
    floor=_both(floors.pool),
    torch_bytes=_both(_pool_bytes(0)),
    torch=lambda F, t: F.adaptive_avg_pool2d(t["x"], 1),  # noqa: N803
    expression=lambda xp, a, last: a["x"].mean(axis=(1, 2) if last else (2, 3), keepdims=True),
    jax=lambda jax, a, last: a["x"].mean(axis=(1, 2) if last else (2, 3), keepdims=True),
    output_shape=lambda shape: (*shape[:2], 1, 1),
    layouts=(False, True),
)

BATCH_NORM_RELU_MAX_POOL = Operation(
    name="batch_norm_relu_max_pool",
    shapes=_IMAGES[:4],
    forward=lambda a, last: ops.batch_norm_max_pool_forward(
        a["x"], a["gamma"], a["beta"], (3, 3), 2, 1, eps=_EPS, activation="relu", channels_last=last
    ),
    backward=ops.batch_norm_max_pool_backward,
    floor=_each(floors.batch_norm_max_pool, affine=True),
    # Batch norm 3 forward and 5 backward, ReLU 2 and 3, and the pooling.
    torch_bytes={
        FORWARD: lambda s: s.elements(6, 1) + 8 * s.outputs,
        BACKWARD: lambda s: s.elements(9, 1) + 8 * s.outputs,
    },
    takes_maximum=True,
    rounds_gradient=True,
    torch=lambda F, t: F.max_pool2d(  # noqa: N803
        F.relu(F.batch_norm(t["x"], None, None, t["gamma"], t["beta"], True, 0.1, _EPS)), *_MAX_WINDOW
    ),
    output_shape=_pooled(_MAX_WINDOW),
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)

ADAPTIVE_AVG_POOL = Operation(
    name="adaptive_avg_pool",
    shapes=_IMAGES[:3],
    forward=lambda a, last: ops.adaptive_avg_pool_forward(a["x"], (5, 5), channels_last=last),
    backward=ops.avg_pool_backward,
    floor=_both(floors.pool),
    torch_bytes=_both(_pool_bytes(0)),
    torch=lambda F, t: F.adaptive_avg_pool2d(t["x"], 5),  # noqa: N803
    output_shape=lambda shape: (*shape[:2], 5, 5),
    layouts=(False, True),
)

ADAPTIVE_MAX_POOL = Operation(
    name="adaptive_max_pool",
    shapes=_IMAGES[:3],
    forward=lambda a, last: ops.adaptive_max_pool_forward(a["x"], (5, 5), channels_last=last),
    backward=ops.max_pool_backward,
    floor=_both(lambda s: floors.pool(s, 1)),
    torch_bytes=_both(_pool_bytes(8)),
    torch=lambda F, t: F.adaptive_max_pool2d(t["x"], 5),  # noqa: N803
    output_shape=lambda shape: (*shape[:2], 5, 5),
    layouts=(False, True),
)

LP_POOL = Operation(
    name="lp_pool",
    shapes=_IMAGES[:3],
    forward=lambda a, last: ops.lp_pool_forward(a["x"], 2.0, (2, 2), channels_last=last),
    backward=ops.lp_pool_backward,
    floor=_each(floors.lp_pool),
    # A chain of kernels: power and mean of x; sign, size, ReLU, two products and root of y. Back, each with its
    # gradient, the powers in three steps.
    torch_bytes={FORWARD: lambda s: s.elements(3, 14), BACKWARD: lambda s: s.elements(8, 28)},
    torch=lambda F, t: F.lp_pool2d(t["x"], 2.0, 2),  # noqa: N803
    output_shape=_pooled(_AVG_WINDOW),
    layouts=(False, True),
)


@cache
def _places(module: Any, shape: Shape) -> Any:
    """Of values, the first place in their windows of 2 x 2: flat in a plane of twice the sizes."""
    *_, rows, columns = shape
    first = 2 * (2 * columns) * np.arange(rows)[:, None] + 2 * np.arange(columns)
    return module.asarray(np.ascontiguousarray(np.broadcast_to(first, shape)))


MAX_UNPOOL = Operation(
    name="max_unpool",
    shapes=(LARGE_IMAGES[0], *SMALL_IMAGES),
    forward=lambda a, last: ops.max_unpool_forward(
        a["x"],
        _places(array_module(a["x"]), a["x"].shape),
        tuple(2 * size for size in a["x"].shape[2:]),
        check=False,
    ),
    backward=ops.max_unpool_backward,
    # The sectors of the gradient that an index points into: every other row.
    floor=_each(lambda s, direction: floors.max_unpool(s, direction, touched=s.elements(2))),
    torch_bytes={
        FORWARD: lambda s: s.elements(1, 1) + 8 * s.inputs,
        BACKWARD: lambda s: s.elements(3) + 8 * s.inputs,
    },
    output_shape=lambda shape: (*shape[:2], *(2 * size for size in shape[2:])),
)


def _half(shape: Shape) -> Shape:
    return (*shape[:2], *(size // 2 for size in shape[2:]))


def _starts_bytes(s: Sizes) -> int:
    return 4 * math.prod(s.shape[:2]) * sum(size // 2 for size in s.shape[2:])


@cache
def _samples(module: Any, images: int, channels: int, dtype: Any) -> Any:
    """Numbers of the windows, the same of every image: drawn ones are those of the whole batch."""
    of_an_image = np.random.default_rng(_SEED).random((1, channels, 2), np.float32).astype(accumulation_dtype(dtype))
    return module.asarray(np.repeat(of_an_image, images, axis=0))


FRACTIONAL_MAX_POOL = Operation(
    name="fractional_max_pool",
    shapes=LARGE_IMAGES[:1],
    forward=lambda a, last: ops.fractional_max_pool_forward(
        a["x"],
        (2, 2),
        _half((0, 0, *(a["x"].shape[1:-1] if last else a["x"].shape[2:])))[2:],
        samples=_samples(array_module(a["x"]), a["x"].shape[0], a["x"].shape[-1 if last else 1], a["x"].dtype),
        channels_last=last,
    ),
    backward=ops.fractional_max_pool_backward,
    floor=_each(lambda s, direction: floors.fractional_max_pool(s, direction, _starts_bytes(s))),
    torch_bytes=_both(_pool_bytes(8)),
    torch=lambda F, t: F.fractional_max_pool2d(t["x"], 2, _half(t["x"].shape)[2:]),  # noqa: N803
    output_shape=_half,
    layouts=(False, True),
    # PyTorch draws numbers of its own.
    is_random=True,
    # A kernel computes the starts of the windows.
    is_modelled=False,
)


@cache
def _second_taps(module: Any, shape: Shape, channels_last: bool) -> ops.MaxPoolSaved:
    """Of a pooling by windows of 2 x 2, of which each chose its second element."""
    _, saved = launched_nowhere(lambda: ops.max_pool_forward(np.empty(shape, np.float32), (2, 2)))
    return replace(saved, argmax=module.ones(saved.argmax.shape, np.uint8))


def _gathered(x: Any) -> Any:
    saved = _second_taps(array_module(x), x.shape, False)
    return ops.max_pool_gather(x, replace(saved, dtype=x.dtype))


MAX_POOL_GATHER = Operation(
    name="max_pool_gather",
    shapes=LARGE_IMAGES,
    forward=lambda a, last: (_gathered(a["x"]), None),
    backward=None,
    # Of the windows of 2 x 2 the first row.
    floor={FORWARD: lambda s: s.elements(0, 1) + s.outputs + s.itemsize * s.inputs // 2},
    torch_bytes={FORWARD: lambda s: s.elements(0, 1) + 8 * s.outputs + s.itemsize * s.inputs // 2},
    output_shape=_pooled(_AVG_WINDOW),
    is_training=False,
)


@cache
def _unit_statistics(module: Any, channels: int, dtype: Any) -> Any:
    """Mean 0, variance 1, gamma 1, beta 0."""
    statistics = module.zeros((5, channels), dtype)
    statistics[1:4] = 1
    return statistics


def _double_backward(a: Arrays, last: bool) -> Any:
    x, gamma, beta = a["x"], a["gamma"], a["beta"]
    statistics = _unit_statistics(array_module(x), gamma.size, gamma.dtype)
    saved = ops.BatchNormSaved(x, statistics, last, None, "relu")
    # Of the results the gradient of dy, which is what is looked at.
    return ops.batch_norm_double_backward(a["ddx"], gamma, beta, a["gradient"], saved)[0], None


BATCH_NORM_DOUBLE_BACKWARD = Operation(
    name="batch_norm_double_backward",
    shapes=LARGE_IMAGES[:1],
    forward=_double_backward,
    backward=None,
    floor={FORWARD: floors.batch_norm_double_backward},
    # PyTorch's is a formula of some thirty operations on whole arrays, of three each.
    torch_bytes={FORWARD: lambda s: s.elements(90)},
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    like_x=("ddx", "gradient"),
    independent="channels",
    is_training=False,
)

OPERATIONS: tuple[Operation, ...] = (
    DROPOUT,
    RELU,
    BATCH_NORM,
    BATCH_NORM_INFERENCE,
    BATCH_NORM_SUM_RELU,
    BATCH_NORM_RELU_MAX_POOL,
    GHOST_BATCH_NORM,
    SYNC_BATCH_NORM,
    PADDED_BATCH_NORM,
    MAX_POOL,
    AVG_POOL,
    ACTIVATION_DROPOUT,
    GLOBAL_AVG_POOL,
    ADAPTIVE_AVG_POOL,
    ADAPTIVE_MAX_POOL,
    PYRAMID_MAX_POOL,
    LP_POOL,
    MAX_UNPOOL,
    CHANNEL_DROPOUT,
    ALPHA_DROPOUT,
    RELU_DROPOUT,
    SAMPLE_DROPOUT,
    DROP_PATH,
    FEATURE_ALPHA_DROPOUT,
    DROPOUT_ACTIVATION,
    DROPOUT_MOMENTS,
    DROPOUT_ADD,
    GELU_DROPOUT_ADD,
    SHARED_DROPOUT,
    FRACTIONAL_MAX_POOL,
    MAX_POOL_GATHER,
    BATCH_NORM_DOUBLE_BACKWARD,
)

#: What most networks spend their time on: measured first, and against what takes long to compile.
HEADLINE: tuple[Operation, ...] = (
    BATCH_NORM,
    DROPOUT,
    MAX_POOL,
    AVG_POOL,
    ACTIVATION_DROPOUT,
    BATCH_NORM_RELU_MAX_POOL,
)
