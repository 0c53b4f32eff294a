"""Cases of batch normalisation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpu_layers import ops
from gpu_layers.layers.batch_norm import BatchNorm2d
from gpu_layers.reference.batch_norm import statistics_dtype
from gpu_layers.runtime.cuda import is_cupy_array
from gpu_layers.runtime.kernel import FLOAT_DTYPES
from gpu_layers.verification.batch_norm_bounds import STEEPEST, batch_norm_bounds
from gpu_layers.verification.comparison import Arrays, Case, epsilon, smallest
from gpu_layers.verification.inputs import normal

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


def _double_backward(dtype, shape, activation, residual, channels_last) -> Case:
    in_memory = (shape[0], *shape[2:], shape[1]) if channels_last else shape
    axes = tuple(axis for axis in range(len(shape)) if axis != (len(shape) - 1 if channels_last else 1))
    parameters = statistics_dtype(dtype)

    def per_channel(values: Any) -> Any:
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

        def mean_of(values: Any) -> Any:
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
