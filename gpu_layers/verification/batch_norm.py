"""Cases of batch normalisation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gpu_layers import ops
from gpu_layers.layers.batch_norm import BatchNorm2d
from gpu_layers.reference.batch_norm import statistics_dtype
from gpu_layers.runtime.cuda import is_cupy_array
from gpu_layers.runtime.kernel import FLOAT_DTYPES
from gpu_layers.verification.batch_norm_bounds import STEEPEST, batch_norm_bounds
from gpu_layers.verification.comparison import Arrays, Case, epsilon
from gpu_layers.verification.inputs import normal, with_special_values

# (N, C, *spatial): odd planes and planes of whole vectors; planes shorter than a vector; a long plane; few values
# of many channels and the reverse; two-dimensional input; channels that do and do not make 16-byte vectors.
_SHAPES = (
    (3, 5, 9, 11),
    (2, 16, 8, 8),
    (1, 3, 61, 130),
    (70, 3, 1, 1),
    (5, 8, 7),
    (33, 40),
    (3, 9),
    (2, 300),
    (2, 8, 3, 4, 5),
)
_EPS = 1e-5


def batch_norm_cases() -> Iterator[Case]:
    """Training and inference in both layouts, with a mean that is far from 0."""
    for dtype in FLOAT_DTYPES:
        # As far as a channel's spread is still resolved.
        far = 1e6 if dtype in (np.float32, np.float64) else 30.0
        for shape in _SHAPES:
            yield _batch_norm(dtype, f"{list(shape)}", shape, 2.0, False)
            channels_last = (shape[0], *shape[2:], shape[1])
            yield _batch_norm(dtype, f"{list(channels_last)}, channels_last", channels_last, 2.0, True)
        yield _batch_norm(dtype, "far from 0", (4, 6, 10, 10), far, False)
        yield _batch_norm(dtype, "far from 0, channels_last", (4, 10, 10, 6), far, True)
        if dtype != np.float16:
            # Sums of squares leave float32's range.
            scale = 1e17 if dtype != np.float64 else 1e100
            yield _batch_norm(dtype, "large", (2, 3, 110, 111), 2.0, False, scale=scale)
            yield _batch_norm(dtype, "large, channels_last", (2, 30, 31, 8), 2.0, True, scale=scale)
        yield _infinite(dtype)
        yield _batch_norm(dtype, "vectors of several blocks, channels_last", (1, 40, 40, 8), 2.0, True)
        yield _batch_norm(dtype, "no gamma, no beta", (4, 6, 5, 5), 2.0, False, affine=False)
        yield _batch_norm(dtype, "non-contiguous", (4, 6, 10, 10), 2.0, False, stride=2)
        yield _constant(dtype)
        yield _running(dtype)
        for activation in STEEPEST:
            residual = activation not in ("relu", "tanh")
            label = f"{activation}{' of a sum' if residual else ''}"
            yield _batch_norm(dtype, label, (3, 5, 9, 11), 2.0, False, activation=activation, residual=residual)
            label, shape = f"{label}, channels_last", (3, 9, 7, 16 if residual else 5)
            yield _batch_norm(dtype, label, shape, 2.0, True, activation=activation, residual=residual)
        label = "relu of a sum, non-contiguous"
        yield _batch_norm(dtype, label, (4, 6, 10, 10), 2.0, False, stride=2, activation="relu", residual=True)
        # Of each block that merges the parts of eight channels the second has only some.
        label = "gelu, two reads, parts of 12 channels"
        yield _batch_norm(dtype, label, (70, 12, 3, 3), 2.0, False, activation="gelu")
        for activation in ("relu", "leaky_relu"):
            yield _special_residual(dtype, (3, 5, 9, 11), False, activation)
            yield _special_residual(dtype, (3, 9, 7, 16), True, activation)
        yield _not_a_number(dtype, (3, 2, 1, 1))
        yield _not_a_number(dtype, (3, 8))


def _batch_norm(
    dtype, label, shape, mean, channels_last, *, affine=True, stride=1, activation=None, residual=False, scale=1.0
) -> Case:
    parameters = statistics_dtype(dtype)
    channels = shape[-1] if channels_last else shape[1]

    def inputs() -> Arrays:
        x = (normal(shape, np.float64, mean=mean) * scale).astype(dtype)
        arrays = {"x": x, "dy": normal(shape, dtype, "dy")}
        if affine:
            arrays["gamma"] = normal((channels,), parameters, "gamma")
            arrays["beta"] = normal((channels,), parameters, "beta")
        if residual:
            arrays["residual"] = normal(shape, dtype, "residual")
        return arrays

    def run(arrays: Arrays) -> Arrays:
        x, dy = arrays["x"][..., ::stride], arrays["dy"][..., ::stride]
        gamma, beta = arrays.get("gamma"), arrays.get("beta")
        options = {"eps": _EPS, "channels_last": channels_last, "activation": activation}
        if residual:
            options["residual"] = arrays["residual"][..., ::stride]
        y, saved = ops.batch_norm_forward(x, gamma, beta, **options)
        dx, dgamma, dbeta, *dresidual = ops.batch_norm_backward(dy, saved)
        given = ops.batch_norm_inference(x, saved.mean, saved.var, gamma, beta, **options)
        inference_dx, _, _, *inference_dresidual = ops.batch_norm_inference_backward(dy, given[1])
        of_residual = {"dresidual": dresidual[0], "inference dresidual": inference_dresidual[0]} if residual else {}
        return {
            **of_residual,
            "y": y,
            "mean": saved.mean,
            "var": saved.var,
            "inv_std": saved.inv_std,
            "dx": dx,
            "dgamma": dgamma,
            "dbeta": dbeta,
            "inference y": given[0],
            "inference dx": inference_dx,
        }

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        taken: Arrays = {name: inputs[name][..., ::stride] for name in ("x", "dy", "residual") if name in inputs}
        return batch_norm_bounds({**inputs, **taken}, expected, channels_last=channels_last, activation=activation)

    return Case("batch_norm", dtype, label, inputs, run, bounds)


def _special_residual(dtype: Any, shape: tuple[int, ...], channels_last: bool, activation: str) -> Case:
    """NaN and infinities that a residual brings behind the normalisation: they spoil their own elements alone."""
    label = f"{activation} of special values{', channels_last' if channels_last else ''}"
    plain = _batch_norm(dtype, label, shape, 2.0, channels_last, activation=activation, residual=True)

    def inputs() -> Arrays:
        arrays = plain.inputs()
        return arrays | {"residual": with_special_values(arrays["residual"])}

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        # Where the sum is not finite, the slope is exact, and so is what it makes of dy: nothing is allowed but the
        # rounding of a product.
        residual = inputs["residual"]
        return plain.bounds({**inputs, "residual": np.where(np.isfinite(residual), residual, 0)}, expected)

    return replace(plain, inputs=inputs, bounds=bounds)


def _not_a_number(dtype: Any, shape: tuple[int, ...]) -> Case:
    """Of a channel with a NaN nothing is known, were it all a single thread's; of the others everything."""
    plain = _batch_norm(dtype, f"{list(shape)} with NaN", shape, 2.0, False)

    def inputs() -> Arrays:
        arrays = plain.inputs()
        arrays["x"][1, 0] = np.nan
        return arrays

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        # Of that channel only dbeta is a number: a sum that the statistics are no part of.
        known = {name: np.nan_to_num(expected[name]) for name in ("mean", "inv_std")}
        return plain.bounds({**inputs, "x": np.nan_to_num(inputs["x"])}, {**expected, **known})

    return replace(plain, inputs=inputs, bounds=bounds)


# How a layer folds the statistics of a batch into the running ones: in the kernels of the forward (of one read, and of
# two), and by a kernel for that alone.
_FOLDINGS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.3},
    "momentum, two reads": {"momentum": 0.3, "activation": "gelu"},
    "average": {"momentum": None},
    "finite batches": {"momentum": 0.3},
}


def _running(dtype) -> Case:
    """Running statistics, folded in in every way there is; a batch that is left out changes nothing."""
    parameters, channels = statistics_dtype(dtype), 5

    def inputs() -> Arrays:
        x = normal((3, channels, 7, 9), dtype, mean=2.0)
        infinite = x.copy()
        infinite[0, 0, 0, 0] = np.inf
        running = {"running_mean": normal((channels,), parameters), "running_var": np.full(channels, 3, parameters)}
        return {"x": x, "dy": x, "infinite": infinite, **running}

    def run(arrays: Arrays) -> Arrays:
        _, saved = ops.batch_norm_forward(arrays["x"], None, None, eps=_EPS)
        results = {"mean": saved.mean, "var": saved.var, "inv_std": saved.inv_std}
        for name, options in _FOLDINGS.items():
            layer = BatchNorm2d(channels, _EPS, affine=False, dtype=parameters, **options)
            layer.to("cuda" if is_cupy_array(arrays["x"]) else "cpu")
            for buffer in ("running_mean", "running_var"):
                layer.buffers[buffer][...] = arrays[buffer]
            layer.skip_nonfinite = name == "finite batches"
            for x in ("x", "infinite") if layer.skip_nonfinite else ("x", "x"):
                layer(arrays[x])
            results |= {f"{name}: {buffer}": values for buffer, values in layer.buffers.items()}
        return results

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        of_batch = batch_norm_bounds(inputs, expected, channels_last=False)
        unit = epsilon(parameters)
        for name, buffer, of in itertools.product(_FOLDINGS, ("running_mean", "running_var"), ("mean", "var")):
            if buffer.endswith(of):
                # The error of the batch, of weight at most 1 (a variance by 189 / 188), and of each of two batches some
                # roundings of a sum of these magnitudes.
                size = np.maximum(np.abs(inputs[buffer]), np.abs(expected[of])).astype(np.float64)
                of_batch[f"{name}: {buffer}"] = 1.01 * of_batch[of] + 2 * 5 * unit * 1.01 * size
        return of_batch

    return Case("batch_norm", dtype, "running statistics", inputs, run, bounds)


def _constant(dtype) -> Case:
    """Constant channels give exactly beta, variance 0 and their own value as the mean, to the last bit."""
    parameters = statistics_dtype(dtype)

    def inputs() -> Arrays:
        values = np.array([0.1, -3.3, 60000.0, 0.0, 7e-3], dtype)
        x = np.broadcast_to(values.reshape(1, -1, 1, 1), (3, 5, 7, 9)).copy()
        return {"x": x, "beta": normal((5,), parameters, "beta")}

    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.batch_norm_forward(arrays["x"], None, arrays["beta"])
        return {"y": y, "mean": saved.mean, "var": saved.var}

    return Case("batch_norm", dtype, "constant channels", inputs, run)


def _infinite(dtype) -> Case:
    """Of a channel with an infinity nothing is known, wherever it is; of its neighbours in a vector all."""

    def inputs() -> Arrays:
        x = normal((2, 8), dtype)
        x[0, 0] = x[1, 1] = x[0, 2] = np.inf
        x[1, 2] = x[1, 3] = -np.inf
        x[0, 4] = np.nan
        return {"x": x}

    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.batch_norm_forward(arrays["x"], None, None)
        return {"y": y, "mean": saved.mean, "var": saved.var, "inv_std": saved.inv_std}

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        x = np.where(np.isfinite(inputs["x"]), inputs["x"], 0).astype(dtype)
        return batch_norm_bounds({"x": x, "dy": np.zeros_like(x)}, expected, channels_last=False)

    return Case("batch_norm", dtype, "infinities", inputs, run, bounds)
