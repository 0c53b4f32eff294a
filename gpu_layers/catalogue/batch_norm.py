"""Batch normalisation: in training, with given statistics, and its second derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from gpu_layers import layers, ops
from gpu_layers.catalogue.batch_norm_bounds import STEEPEST, batch_norm_bounds
from gpu_layers.catalogue.case import Arrays, Case, epsilon, smallest
from gpu_layers.catalogue.inputs import negative_zeros, normal, with_special_values
from gpu_layers.catalogue.operation import (
    BACKWARD,
    FORWARD,
    IMAGES,
    LARGE_IMAGES,
    SMALL_ROWS,
    Called,
    Operation,
    Shape,
    Sizes,
    of_ranks,
)
from gpu_layers.catalogue.traffic import Prepared, TrafficCase, in_layout, passes
from gpu_layers.core.array import Array, Options
from gpu_layers.core.cuda import array_module, is_cupy_array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.kernels.batch_norm_plan import backward_plan, forward_plan
from gpu_layers.layers.batch_norm import BatchNorm2d
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.kernel import FLOAT_DTYPES

#: The page of the documents that has these operations.
PAGE = "batch_norm"

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


def double_backward_cases() -> Iterator[Case]:
    """Second derivatives, by statistics that are given: those of the input."""
    for dtype in FLOAT_DTYPES:
        for shape in ((3, 5, 9, 11), (2, 16, 8, 8), (33, 40), (3, 9), (70, 3, 1, 1)):
            for activation, residual in (("identity", False), ("relu", True), ("leaky_relu", False)):
                for channels_last in (False, True):
                    yield _double_backward(dtype, shape, activation, residual, channels_last)


def _double_backward(
    dtype: np.dtype, shape: tuple[int, ...], activation: str, residual: bool, channels_last: bool
) -> Case:
    in_memory = (shape[0], *shape[2:], shape[1]) if channels_last else shape
    axes = tuple(axis for axis in range(len(shape)) if axis != (len(shape) - 1 if channels_last else 1))
    parameters = accumulation_dtype(dtype)

    def per_channel(values: Array) -> Array:
        return values if channels_last else values.reshape(-1, *[1] * (len(shape) - 2))

    def inputs() -> Arrays:
        x, r = normal(in_memory, np.float64, mean=2.0), normal(in_memory, np.float64, "residual")
        gamma, beta = (normal((shape[1],), parameters, name) + 1 for name in ("gamma", "beta"))
        x = x.astype(dtype).astype(np.float64)
        mean, var = x.mean(axis=axes), x.var(axis=axes)
        statistics = np.stack([mean, var, 1 / np.sqrt(var + _EPS), gamma, beta]).astype(parameters)
        mean, _, inv_std, gamma, beta = statistics.astype(np.float64)
        # No value so near a kink that rounding decides: the residual is moved, or the element has no gradient.
        z = (x - per_channel(mean)) * per_channel(gamma * inv_std) + per_channel(beta)
        r = np.where(np.abs(z + r) < 0.1, r + 0.3, r).astype(dtype)
        dy = np.where(np.abs(z) < 0.02, 0, normal(in_memory, np.float64, "dy")).astype(dtype)
        given = {name: normal(in_memory, dtype, name) for name in ("ddx", "ddresidual")}
        of_channels = {name: normal((shape[1],), parameters, name) for name in ("ddgamma", "ddbeta")}
        return {"x": x.astype(dtype), "residual": r, "dy": dy, "statistics": statistics, **given, **of_channels}

    def run(arrays: Arrays) -> Arrays:
        added = arrays["residual"] if residual else None
        saved = ops.BatchNormSaved(arrays["x"], arrays["statistics"], channels_last, added, activation)
        ddresidual = arrays["ddresidual"] if residual else None
        given = (arrays["ddx"], arrays["ddgamma"], arrays["ddbeta"], arrays["dy"])
        ddy, dx, dgamma = ops.batch_norm_double_backward(*given, saved, ddresidual=ddresidual)
        return {"ddy": ddy, "dx": dx, "dgamma": dgamma}

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        """Every sum of its terms' sizes: each term is rounded by the operations on its way, fewer than ``units``."""
        wide = {name: np.abs(values.astype(np.float64)) for name, values in inputs.items()}
        mean, _, inv_std, gamma, _ = inputs["statistics"].astype(np.float64)
        v, w, x = wide["ddx"], wide["dy"], inputs["x"].astype(np.float64)
        xhat = np.abs(x - per_channel(mean)) * per_channel(inv_std)
        scale, m = np.abs(gamma) * inv_std, x.size // gamma.size
        units = epsilon(parameters) * (m + 24)

        def mean_of(values: Array) -> Array:
            return values.mean(axis=axes)

        v_xhat, w_xhat = mean_of(v * xhat), mean_of(w * xhat)
        ddy = per_channel(scale) * (v + per_channel(mean_of(v)) + xhat * per_channel(v_xhat))
        ddy += per_channel(wide["ddgamma"]) * xhat + per_channel(wide["ddbeta"]) + wide["ddresidual"]
        dxhat = per_channel(wide["ddgamma"] + scale * v_xhat) * w + per_channel(scale * w_xhat) * v
        product = mean_of(v * w) + mean_of(v) * mean_of(w) + v_xhat * w_xhat
        dx = dxhat + per_channel(mean_of(dxhat)) + xhat * per_channel(mean_of(dxhat * xhat) + scale * product)
        dx *= per_channel(inv_std)
        allowed = {"ddy": units * ddy, "dx": units * dx, "dgamma": units * m * inv_std * product}
        if dtype != parameters:
            for name in ("ddy", "dx"):
                stored = epsilon(dtype) * np.abs(expected[name].astype(np.float64)) + smallest(dtype)
                allowed[name] = allowed[name] + stored
        # A leaky gradient at a kink is off by as much as it is.
        if activation != "identity" and not residual:
            z = (x - per_channel(mean)) * per_channel(gamma * inv_std)
            z += per_channel(inputs["statistics"][4].astype(np.float64))
            allowed["ddy"] = allowed["ddy"] + np.where(np.abs(z) < 1e-3, ddy, 0)
        return allowed

    label = f"{list(in_memory)} {activation}{' of a sum' if residual else ''}{', channels_last' * channels_last}"
    return Case("batch_norm_double_backward", dtype, label, inputs, run, bounds)


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
        yield _infinite(dtype, (2, 8), True)
        # Of the last thread the last value: others find it only when they are merged with it.
        yield _infinite(dtype, (512, 8), True)
        yield _infinite(dtype, (1, 8, 64, 64), False)
        if dtype != np.float16:
            yield _largest(dtype, (2, 8), True)
            yield _largest(dtype, (3, 7), True)
            yield _largest(dtype, (3, 8, 1, 1), False)
        yield _batch_norm(dtype, "vectors of several blocks, channels_last", (1, 40, 40, 8), 2.0, True)
        yield _batch_norm(dtype, "no gamma, no beta", (4, 6, 5, 5), 2.0, False, affine=False)
        yield _batch_norm(dtype, "non-contiguous", (4, 6, 10, 10), 2.0, False, stride=2)
        yield _constant(dtype)
        yield _running(dtype)
        if dtype == accumulation_dtype(dtype):
            yield _fold(dtype)
        yield _of_negative_zeros(dtype, (3, 5, 9, 11), False)
        yield _of_negative_zeros(dtype, (3, 9, 7, 16), True)
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
    dtype: np.dtype,
    label: str,
    shape: tuple[int, ...],
    mean: float,
    channels_last: bool,
    *,
    affine: bool = True,
    stride: int = 1,
    activation: str | None = None,
    residual: bool = False,
    scale: float = 1.0,
) -> Case:
    parameters = accumulation_dtype(dtype)
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
        options: Options = {"eps": _EPS, "channels_last": channels_last, "activation": activation}
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


def _special_residual(dtype: np.dtype, shape: tuple[int, ...], channels_last: bool, activation: str) -> Case:
    """NaN and infinities that a residual brings after the normalisation: they spoil their own elements alone."""
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


def _not_a_number(dtype: np.dtype, shape: tuple[int, ...]) -> Case:
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
_FOLDINGS: dict[str, Options] = {
    "momentum": {"momentum": 0.3},
    "momentum, two reads": {"momentum": 0.3, "activation": "gelu"},
    "average": {"momentum": None},
    "finite batches": {"momentum": 0.3},
}


def _running(dtype: np.dtype) -> Case:
    """Running statistics, folded in in every way there is; a batch that is left out changes nothing."""
    parameters, channels = accumulation_dtype(dtype), 5

    def inputs() -> Arrays:
        # Another batch each time: the weight of a batch that is folded in again does not show.
        first, second = (normal((3, channels, 7, 9), dtype, mean, mean=mean) for mean in (2.0, -1.0))
        infinite = first.copy()
        infinite[0, 0, 0, 0] = np.inf
        running = {"running_mean": normal((channels,), parameters), "running_var": np.full(channels, 3, parameters)}
        return {"first": first, "second": second, "infinite": infinite, **running}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for batch in ("first", "second"):
            _, saved = ops.batch_norm_forward(arrays[batch], None, None, eps=_EPS)
            results |= {f"{batch} {name}": getattr(saved, name) for name in ("mean", "var", "inv_std")}
        for name, options in _FOLDINGS.items():
            layer = BatchNorm2d(channels, _EPS, affine=False, dtype=parameters, **options)
            layer.to("cuda" if is_cupy_array(arrays["first"]) else "cpu")
            for buffer in ("running_mean", "running_var"):
                layer.buffers[buffer][...] = arrays[buffer]
            layer.skip_nonfinite = name == "finite batches"
            for batch in ("first", "infinite", "second") if layer.skip_nonfinite else ("first", "second"):
                layer(arrays[batch])
            results |= {f"{name}: {buffer}": values for buffer, values in layer.buffers.items()}
        return results

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        of_batches: Arrays = {}
        for batch in ("first", "second"):
            of_batch = {name: expected[f"{batch} {name}"] for name in ("mean", "var", "inv_std")}
            found = batch_norm_bounds({"x": inputs[batch], "dy": inputs[batch]}, of_batch, channels_last=False)
            of_batches |= {f"{batch} {name}": found[name] for name in of_batch}
        unit = epsilon(parameters)
        for name, buffer, of in itertools.product(_FOLDINGS, ("running_mean", "running_var"), ("mean", "var")):
            if buffer.endswith(of):
                # The error of each batch, of weight at most 1 (a variance by 189 / 188), and of each some roundings of
                # a sum of these magnitudes.
                values = (inputs[buffer], expected[f"first {of}"], expected[f"second {of}"])
                size = np.max(np.abs(values), axis=0).astype(np.float64)
                error = of_batches[f"first {of}"] + of_batches[f"second {of}"]
                of_batches[f"{name}: {buffer}"] = 1.01 * error + 2 * 5 * unit * 1.01 * size
        return of_batches

    return Case("batch_norm", dtype, "running statistics", inputs, run, bounds)


# What may be wrong with the statistics of a batch: channel, row and value. A variance may leave the range by itself.
_SPOILT = {"": None, "mean": (-1, 0, np.nan), "variance": (-1, 1, np.inf), "inv_std alone": (0, 2, np.inf)}


def _fold(dtype: np.dtype) -> Case:
    """Given statistics of fewer and of more channels than a block has threads, folded in by all rules: every bit."""

    def inputs() -> Arrays:
        arrays: Arrays = {"True": np.array(True), "False": np.array(False)}
        arrays |= {f"{values}": np.array(values) for values in _VALUES if isinstance(values, float)}
        for channels in (5, 300):
            running = {"mean": normal((channels,), dtype), "var": np.full(channels, 3, dtype)}
            arrays |= {f"{name} {channels}": values for name, values in running.items()}
            for spoilt, place in _SPOILT.items():
                statistics = abs(normal((5, channels), dtype, "statistics"))
                if place is not None:
                    channel, row, value = place
                    statistics[row, channel] = value
                arrays[f"statistics {channels} {spoilt}"] = statistics
        return arrays | {"batches": np.array(2), "skipped": np.array(4)}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        rules = itertools.product((5, 300), _SPOILT, (None, 0.3), _VALUES, (False, True), (None, True, False))
        for channels, spoilt, momentum, values, finite_only, accepted in rules:
            changed = [arrays[name].copy() for name in (f"mean {channels}", f"var {channels}", "batches", "skipped")]
            mean, var, batches, skipped = changed
            backend_for(mean).batch_norm_fold(
                arrays[f"statistics {channels} {spoilt}"],
                RunningStatistics(
                    *(mean, var, batches, momentum, arrays.get(f"{values}", values)),
                    *(None if accepted is None and not finite_only else skipped, finite_only),
                ),
                None if accepted is None else arrays[str(accepted)],
            )
            name = f"{channels}, {spoilt}, momentum={momentum}, {values} values, {finite_only=}, {accepted=}"
            results |= {f"{of} of {name}": array for of, array in zip(_CHANGED, changed, strict=True)}
        return results

    return Case("batch_norm", dtype, "folding", inputs, run)


# Of the batch, which the host knows, or the device alone.
_VALUES = (0, 1, 7, 0.0, 1.0, 7.0)
_CHANGED = ("mean", "var", "batches", "skipped")


def _constant(dtype: np.dtype) -> Case:
    """Constant channels give exactly beta, variance 0 and their own value as the mean, to the last bit."""
    parameters = accumulation_dtype(dtype)

    def inputs() -> Arrays:
        values = np.array([0.1, -3.3, 60000.0, 0.0, 7e-3], dtype)
        x = np.broadcast_to(values.reshape(1, -1, 1, 1), (3, 5, 7, 9)).copy()
        return {"x": x, "beta": normal((5,), parameters, "beta")}

    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.batch_norm_forward(arrays["x"], None, arrays["beta"])
        return {"y": y, "mean": saved.mean, "var": saved.var}

    return Case("batch_norm", dtype, "constant channels", inputs, run)


def _infinite(dtype: np.dtype, shape: tuple[int, ...], channels_last: bool) -> Case:
    """Of a channel with an infinity nothing is known, wherever it is; of its neighbours in a vector all."""

    def inputs() -> Arrays:
        x = normal(shape, dtype)
        channels = x.reshape(-1, shape[-1]) if channels_last else np.moveaxis(x, 1, -1).reshape(-1, shape[1])
        channels[0, 0] = channels[-1, 1] = channels[0, 2] = channels[-1, 5] = np.inf
        channels[-1, 2] = channels[-1, 3] = channels[len(channels) // 2, 6] = -np.inf
        channels[0, 4] = np.nan
        return {"x": channels.reshape(shape) if channels_last else _channels_first(channels, shape)}

    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.batch_norm_forward(arrays["x"], None, None, channels_last=channels_last)
        return {"y": y, "mean": saved.mean, "var": saved.var, "inv_std": saved.inv_std}

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        x = np.where(np.isfinite(inputs["x"]), inputs["x"], 0).astype(dtype)
        return batch_norm_bounds({"x": x, "dy": np.zeros_like(x)}, expected, channels_last=channels_last)

    label = f"infinities, {list(shape)}{', channels_last' if channels_last else ''}"
    return Case("batch_norm", dtype, label, inputs, run, bounds)


def _channels_first(channels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    batch, _, *spatial = shape
    return np.ascontiguousarray(np.moveaxis(channels.reshape(batch, *spatial, -1), -1, 1))


def _largest(dtype: np.dtype, shape: tuple[int, ...], channels_last: bool) -> Case:
    """Values as large as the dtype has them, of either sign: their difference is beyond it, and so is the variance.

    An eps of that size counts.
    """
    parameters = accumulation_dtype(dtype)

    def inputs() -> Arrays:
        size = np.abs(normal(shape, np.float64)) % 0.1 + 0.8
        signs = np.where(np.arange(size.size).reshape(shape) // size[0].size % 2, -1.0, 1.0)
        return {"x": (size * signs * float(ml_dtypes.finfo(dtype).max)).astype(dtype)}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for eps in (_EPS, float(ml_dtypes.finfo(parameters).max)):
            # A variance of the size of eps.
            x = arrays["x"] * arrays["x"].dtype.type(1 if eps == _EPS else ml_dtypes.finfo(parameters).max ** -0.5)
            y, saved = ops.batch_norm_forward(x, None, None, eps=eps, channels_last=channels_last)
            of_eps = {"y": y, "mean": saved.mean, "var": saved.var, "inv_std": saved.inv_std}
            results |= {f"{name}, eps={eps:g}": values for name, values in of_eps.items()}
        return results

    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        # Means of two or three values round a few sums of that size; a variance is off by twice as much, and a few
        # roundings of its own, and its root by half of that. A tiny inv_std has fewer bits.
        unit, allowed = epsilon(parameters), {}
        for name, values in expected.items():
            size = np.abs(values).astype(np.float64)
            if name.startswith("mean"):
                allowed[name] = 8 * unit * np.abs(inputs["x"]).max().astype(np.float64) * np.ones(size.shape)
            elif name.startswith(("var", "inv_std")):
                allowed[name] = 16 * unit * size + smallest(parameters)
            elif name.startswith("y"):
                allowed[name] = (32 * unit + (epsilon(dtype) if dtype != parameters else 0)) * (1 + size)
        return allowed

    label = f"largest values, {list(shape)}{', channels_last' if channels_last else ''}"
    return Case("batch_norm", dtype, label, inputs, run, bounds)


def _of_negative_zeros(dtype: np.dtype, shape: tuple[int, ...], channels_last: bool) -> Case:
    """Gradients of -0 where the statistics were given: dx is a product and a sum, and has no -0."""
    parameters, channels = accumulation_dtype(dtype), shape[-1 if channels_last else 1]

    def inputs() -> Arrays:
        of_channels = {name: normal((channels,), parameters, name) for name in ("mean", "gamma", "beta")}
        arrays = {"x": normal(shape, dtype), "residual": normal(shape, dtype, "residual")}
        return {**arrays, **of_channels, "var": np.full(channels, 2, parameters), "dy": negative_zeros(shape, dtype)}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        given = [arrays[name] for name in ("x", "mean", "var", "gamma", "beta")]
        for activation, residual in itertools.product((None, "relu", "leaky_relu"), (None, "residual")):
            options: Options = {"activation": activation, "residual": residual and arrays[residual]}
            _, saved = ops.batch_norm_inference(*given, eps=_EPS, channels_last=channels_last, **options)
            gradients = ops.batch_norm_inference_backward(arrays["dy"], saved)
            names = ("dx", "dgamma", "dbeta", "dresidual")[: len(gradients)]
            results |= {f"{of}, {activation}, {residual}": one for of, one in zip(names, gradients, strict=True)}
        return results

    label = f"gradients of -0{', channels_last' if channels_last else ''}"
    return Case("batch_norm", dtype, label, inputs, run)


# ---- what is timed, and whose bytes are counted ----------------------------------------------------------------------

#: Numbers of a channel that a forward of batch norm keeps: mean, variance, 1 / deviation, gamma, beta; and those of
#: them that its backward reads.
KEPT, READ = 5, 4
_SHAPES_TIMED = (*IMAGES[:4], *SMALL_ROWS)


def batch_norm_floor(s: Sizes, direction: str, *, reads: int = 1, residual: bool = False, affine: bool = True) -> int:
    """In training; of a channel what the forward keeps, or what of it the backward reads, and two gradients.

    Each input as often as ``reads`` says: twice where the values cannot be kept until the statistics are known. With a
    residual, ReLU follows, and the residual has a gradient too. ``affine``: gamma and beta are given.
    """
    if direction == FORWARD:
        return s.elements(reads + residual + 1) + (KEPT + 2 * affine) * s.statistic
    return s.elements((2 + residual) * reads + 1 + residual) + (READ + 2) * s.statistic


def reads_of(s: Sizes, direction: str) -> int:
    """How often a pass must read an input of these sizes, by its plan."""
    shape = (s.shape[0], *s.shape[2:], s.shape[1]) if s.channels_last else s.shape
    plan = backward_plan if direction == BACKWARD else forward_plan
    return 1 if plan(shape, s.itemsize, s.channels_last).slots else 2


#: Shapes of images whose bytes are counted, each in both layouts, and of rows.
COUNTED = tuple(
    (shape, layout) for shape in ((2, 16, 112, 112), (4, 32, 56, 56), (8, 64, 7, 7)) for layout in ("NCHW", "NHWC")
)
_COUNTED = (*COUNTED, ((64, 1000), "flat"))


def _traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    for shape, layout in _COUNTED:
        yield from passes(operation, "batch_norm", dtype, shape, layout, floor=_by_plan)


def _sum_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    floor = partial(_by_plan, residual=True)
    for shape, layout in _COUNTED:
        residual = in_layout(shape, dtype, layout)
        yield from passes(operation, "batch_norm sum relu", dtype, shape, layout, floor=floor, residual=residual)


def _by_plan(s: Sizes, direction: str, saved: Any, **options: Any) -> int:
    """The floor without gamma and beta, by what the plan says of an array of these sizes."""
    return batch_norm_floor(s, direction, reads=reads_of(s, direction), affine=False, **options)


def _inference_floor(s: Sizes, direction: str, affine: bool = True) -> int:
    # Of a channel mean and variance, gamma and beta, and what is kept of them.
    return s.elements(2) + (2 + 2 * affine + KEPT) * s.statistic


def _inference_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    for shape, layout in _COUNTED:
        prepare = partial(_given_statistics, dtype, shape, layout)
        yield TrafficCase("batch_norm inference", dtype, shape, layout, prepare)


def _given_statistics(dtype: np.dtype, shape: Shape, layout: str) -> Prepared:
    x = in_layout(shape, dtype, layout)
    options: Options = {"channels_last": layout == "NHWC"}
    _, saved = ops.batch_norm_forward(x, None, None, **options)
    run = partial(ops.batch_norm_inference, x, saved.mean, saved.var, None, None, **options)
    return run, _inference_floor(Sizes(x.size, x.size, x.itemsize, shape), FORWARD, affine=False)


def _training(a: Arrays, channels_last: bool, **options: Any) -> Called:
    return ops.batch_norm_forward(
        a["x"], a.get("gamma"), a.get("beta"), eps=_EPS, channels_last=channels_last, **options
    )


def batch_norm_torch(F: ModuleType, t: Arrays) -> Array:  # noqa: N803 - its usual name
    """PyTorch's batch norm in training."""
    return F.batch_norm(t["x"], None, None, t["gamma"], t["beta"], True, 0.1, _EPS)


def _channel_axis(x: Array, channels_last: bool) -> int:
    return x.ndim - 1 if channels_last else 1


def _other_axes(x: Array, channels_last: bool) -> tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != _channel_axis(x, channels_last))


def _along_channels(values: Array, x: Array, channels_last: bool) -> Array:
    return values.reshape([-1 if axis == _channel_axis(x, channels_last) else 1 for axis in range(x.ndim)])


def _expression(xp: ModuleType, arrays: Arrays, channels_last: bool) -> Array:
    x = arrays["x"].astype(xp.result_type(arrays["x"], arrays["gamma"]))
    axes = _other_axes(x, channels_last)
    mean, var = (arrays.get(name) for name in ("mean", "var"))
    if mean is None:
        mean, var = x.mean(axes), x.var(axes)
    gamma, beta, mean, var = (
        _along_channels(v, x, channels_last) for v in (arrays["gamma"], arrays["beta"], mean, var)
    )
    return ((x - mean) / xp.sqrt(var + _EPS) * gamma + beta).astype(arrays["x"].dtype)


def _gradient(xp: ModuleType, arrays: Arrays, channels_last: bool) -> Array:
    x, dy = (arrays[name].astype(xp.result_type(arrays[name], arrays["gamma"])) for name in ("x", "dy"))
    axes = _other_axes(x, channels_last)
    gamma = _along_channels(arrays["gamma"], x, channels_last)
    inv_std = 1 / xp.sqrt(x.var(axes, keepdims=True) + _EPS)
    xhat = (x - x.mean(axes, keepdims=True)) * inv_std
    inner = dy - dy.mean(axes, keepdims=True) - xhat * (dy * xhat).mean(axes, keepdims=True)
    return (gamma * inv_std * inner).astype(arrays["x"].dtype)


def _sum_expression(xp: ModuleType, arrays: Arrays, channels_last: bool) -> Array:
    z = _expression(xp, arrays, channels_last) + arrays["residual"]
    return xp.where(z > 0, z, xp.zeros_like(z))


BATCH_NORM = Operation(
    name="batch_norm",
    shapes=_SHAPES_TIMED,
    forward=_training,
    backward=ops.batch_norm_backward,
    floor=batch_norm_floor,
    # Two passes over x, and over dy and x.
    torch_bytes=lambda s, direction: batch_norm_floor(s, direction, reads=2),
    cases=(batch_norm_cases,),
    traffic=_traffic,
    layers=of_ranks(
        layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d, arguments=(4,), options={"activation": "relu"}
    ),
    torch=batch_norm_torch,
    expression=_expression,
    gradient=_gradient,
    jax=lambda jax, a, last: _expression(jax.numpy, a, last),
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)

BATCH_NORM_INFERENCE = Operation(
    name="batch_norm_inference",
    shapes=_SHAPES_TIMED,
    forward=lambda a, last: ops.batch_norm_inference(
        a["x"], a["mean"], a["var"], a["gamma"], a["beta"], eps=_EPS, channels_last=last
    ),
    backward=None,
    floor=_inference_floor,
    torch_bytes=_inference_floor,
    traffic=_inference_traffic,
    torch=lambda F, t: F.batch_norm(t["x"], t["mean"], t["var"], t["gamma"], t["beta"], False, 0.1, _EPS),  # noqa: N803
    expression=_expression,
    jax=lambda jax, a, last: _expression(jax.numpy, a, last),
    layouts=(False, True),
    per_channel=("gamma", "beta", "mean", "var"),
    independent="channels",
    is_training=False,
)

BATCH_NORM_SUM_RELU = Operation(
    name="batch_norm_sum_relu",
    shapes=_SHAPES_TIMED,
    forward=lambda a, last: _training(a, last, residual=a["residual"], activation="relu"),
    backward=ops.batch_norm_backward,
    floor=lambda s, direction: batch_norm_floor(s, direction, residual=True),
    # Batch norm, a sum, and ReLU: 3, 3 and 2; backwards 3 of ReLU, whose gradient is the residual's too, and 5.
    torch_bytes=lambda s, direction: s.elements(8),
    traffic=_sum_traffic,
    torch=lambda F, t: F.relu(batch_norm_torch(F, t) + t["residual"]),  # noqa: N803
    expression=_sum_expression,
    jax=lambda jax, a, last: _sum_expression(jax.numpy, a, last),
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    like_x=("residual",),
    independent="channels",
)


@cache
def _unit_statistics(module: ModuleType, channels: int, dtype: np.dtype) -> Array:
    """Mean 0, variance 1, gamma 1, beta 0."""
    statistics = module.zeros((5, channels), dtype)
    statistics[1:4] = 1
    return statistics


def _second_derivatives(a: Arrays, last: bool) -> Called:
    x, gamma, beta = a["x"], a["gamma"], a["beta"]
    statistics = _unit_statistics(array_module(x), gamma.size, gamma.dtype)
    saved = ops.BatchNormSaved(x, statistics, last, None, "relu")
    # Of the results the gradient of dy, which is what is looked at.
    return ops.batch_norm_double_backward(a["ddx"], gamma, beta, a["gradient"], saved)[0], None


def _double_floor(s: Sizes, direction: str) -> int:
    # The gradient of dx, dy and x, twice; results of dy's and x's shapes; of channels two gradients given and one made.
    return s.elements(8) + (READ + 3) * s.statistic


def _double_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    for shape, layout in _COUNTED:
        # Of few values a channel the eleven numbers that lie between the two reads count.
        limit = 1.05 if len(shape) == 4 else 1.2
        prepare = partial(_saved_for_second_derivatives, dtype, shape, layout)
        yield TrafficCase("batch_norm double backward", dtype, shape, layout, prepare, limit)


def _saved_for_second_derivatives(dtype: np.dtype, shape: Shape, layout: str) -> Prepared:
    x, ddx, dy = (in_layout(shape, dtype, layout, name) for name in ("x", "ddx", "dy"))
    _, saved = ops.batch_norm_forward(x, None, None, activation="relu", channels_last=layout == "NHWC")
    run = partial(ops.batch_norm_double_backward, ddx, saved.gamma, saved.beta, dy, saved)
    return run, _double_floor(Sizes(x.size, x.size, x.itemsize, shape), FORWARD)


BATCH_NORM_DOUBLE_BACKWARD = Operation(
    name="batch_norm_double_backward",
    shapes=LARGE_IMAGES[:1],
    forward=_second_derivatives,
    backward=None,
    floor=_double_floor,
    # PyTorch's is a formula of some thirty operations on whole arrays, of three each.
    torch_bytes=lambda s, direction: s.elements(90),
    cases=(double_backward_cases,),
    traffic=_double_traffic,
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    like_x=("ddx", "gradient"),
    independent="channels",
    is_training=False,
)
