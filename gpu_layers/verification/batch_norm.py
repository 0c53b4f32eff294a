"""Cases of batch normalisation, and bounds of the rounding errors of its sums."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpu_layers import ops
from gpu_layers.kernels.batch_norm_plan import summation_depth
from gpu_layers.reference.batch_norm import statistics_dtype
from gpu_layers.runtime.kernel import FLOAT_DTYPES
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
# Of each activation: its largest slope, and how fast the slope changes at most (for those that are not straight lines).
_STEEPEST = {"identity": 1.0, "relu": 1.0, "leaky_relu": 1.0, "sigmoid": 0.25, "tanh": 1.0, "gelu": 1.13, "silu": 1.1}
_BENT = {"sigmoid": 0.1, "tanh": 0.77, "gelu": 0.8, "silu": 0.5}


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
        yield _batch_norm(dtype, "vectors of several blocks, channels_last", (1, 40, 40, 8), 2.0, True)
        yield _batch_norm(dtype, "no gamma, no beta", (4, 6, 5, 5), 2.0, False, affine=False)
        yield _batch_norm(dtype, "non-contiguous", (4, 6, 10, 10), 2.0, False, stride=2)
        yield _constant(dtype)
        for activation in _STEEPEST:
            residual = activation not in ("relu", "tanh")
            label = f"{activation}{' of a sum' if residual else ''}"
            yield _batch_norm(dtype, label, (3, 5, 9, 11), 2.0, False, activation=activation, residual=residual)
            label, shape = f"{label}, channels_last", (3, 9, 7, 16 if residual else 5)
            yield _batch_norm(dtype, label, shape, 2.0, True, activation=activation, residual=residual)
        label = "relu of a sum, non-contiguous"
        yield _batch_norm(dtype, label, (4, 6, 10, 10), 2.0, False, stride=2, activation="relu", residual=True)


def _batch_norm(
    dtype, label, shape, mean, channels_last, *, affine=True, stride=1, activation=None, residual=False
) -> Case:
    parameters = statistics_dtype(dtype)
    channels = shape[-1] if channels_last else shape[1]

    def inputs() -> Arrays:
        arrays = {"x": normal(shape, dtype, mean=mean), "dy": normal(shape, dtype, "dy")}
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
        x = inputs["x"][..., ::stride].astype(np.float64)
        dy = inputs["dy"][..., ::stride].astype(np.float64)
        unit, rounding = epsilon(parameters), epsilon(dtype)
        axes = tuple(axis for axis in range(x.ndim) if axis != (x.ndim - 1 if channels_last else 1))

        def broadcast(values):
            return values if channels_last else values.reshape(-1, *[1] * (x.ndim - 2))

        mean = expected["mean"].astype(np.float64)
        deviation = np.abs(x - broadcast(mean))
        spread = deviation.max(axis=axes)
        # A value passes through `depth` additions, each of which rounds a sum that is below the sum of magnitudes;
        # deviations are taken from a value of the channel, hence at most twice the spread.
        depth = summation_depth(x.shape, dtype, channels_last)
        mean_bound = unit * (np.abs(mean) + 2 * depth * spread)
        var_bound = unit * depth * 4 * spread**2 + mean_bound * spread * unit
        inv_std = expected["inv_std"].astype(np.float64)
        # d(var + eps)^-1/2 = -1/2 (var + eps)^-3/2 d(var), and the few roundings of its evaluation.
        inv_std_bound = 0.5 * inv_std**3 * var_bound + 3 * unit * inv_std
        gamma = np.abs(inputs["gamma"].astype(np.float64)) if affine else np.ones(channels)
        beta = np.abs(inputs["beta"].astype(np.float64)) if affine else np.zeros(channels)
        scale, scale_bound = gamma * inv_std, gamma * inv_std_bound + unit * gamma * inv_std

        def rounded(error, result):
            stored = rounding * np.abs(expected[result].astype(np.float64)) if dtype != parameters else 0
            return error + stored + smallest(dtype)

        z_bound = broadcast(scale_bound) * deviation + broadcast(scale * mean_bound)
        z_bound = z_bound + 3 * unit * (broadcast(scale) * (deviation + unit * np.abs(x)) + broadcast(beta))
        z = np.zeros(x.shape)
        if activation is not None:
            signed_gamma = inputs["gamma"].astype(np.float64) if affine else 1.0
            signed_beta = inputs["beta"].astype(np.float64) if affine else 0.0
            z = (x - broadcast(mean)) * broadcast(signed_gamma * inv_std) + broadcast(signed_beta)
        if residual:
            r = inputs["residual"][..., ::stride].astype(np.float64)
            z, z_bound = z + r, z_bound + 2 * unit * (np.abs(z) + np.abs(r))
        phi = activation or "identity"
        # The activation passes the error of its input on, and adds those of its own functions, which activation.cuh
        # names: below 16 units of the result, but for that of gelu, magnified by up to z**2.
        own = 0.0 if phi not in _BENT else unit * (16 + np.minimum(z * z, 1e3)) * (1 + np.abs(z))
        y = _STEEPEST[phi] * z_bound + own
        # So does its derivative; that of relu is a step where z is 0, which the error of z may cross.
        dz_bound = np.abs(dy) * (_BENT.get(phi, 0.0) * z_bound + own)
        if phi in ("relu", "leaky_relu"):
            dz_bound = dz_bound + np.where(np.abs(z) <= z_bound, np.abs(dy), unit * np.abs(dy))
        # Gradients: the same reasoning for the sums of |dz| and |dz| |x - mean|. The reference sums in float64 but
        # of 1 + unit, which is the rounding of the result.
        dy = dy * _STEEPEST[phi]
        count = x.size // channels
        sum_dy = np.abs(dy).sum(axis=axes)
        sum_dy_deviation = (np.abs(dy) * deviation).sum(axis=axes)
        sum_dz_bound, sum_dz_deviation_bound = dz_bound.sum(axis=axes), (dz_bound * deviation).sum(axis=axes)
        dbeta = unit * depth * sum_dy + sum_dz_bound
        xhat_error = inv_std_bound * sum_dy_deviation + inv_std * mean_bound * sum_dy
        dgamma = unit * (depth + 4) * inv_std * sum_dy_deviation + xhat_error + inv_std * sum_dz_deviation_bound
        mean_dy_error = (dbeta + 2 * unit * sum_dy) / count
        slope_bound = (dgamma + 4 * unit * inv_std * sum_dy_deviation) / count
        inner = np.abs(dy) + broadcast(sum_dy / count) + deviation * broadcast(inv_std**2 * sum_dy_deviation / count)
        dx = broadcast(scale) * (
            broadcast(mean_dy_error)
            + deviation * broadcast(inv_std * slope_bound + inv_std_bound * inv_std * sum_dy_deviation / count)
            + broadcast(mean_bound * inv_std**2 * sum_dy_deviation / count)
            + 4 * unit * inner
            + dz_bound
        )
        dx = dx + broadcast(scale_bound) * inner
        inference_dx = np.abs(dy) * broadcast(scale_bound + 2 * unit * scale) + dz_bound * broadcast(scale)
        of_residual = {}
        if residual:
            of_residual = {name: rounded(dz_bound, name) for name in ("dresidual", "inference dresidual")}
        return {
            **of_residual,
            "y": rounded(y, "y"),
            "mean": mean_bound,
            "var": var_bound + smallest(parameters),
            "inv_std": inv_std_bound,
            "dx": rounded(dx, "dx"),
            "dgamma": dgamma,
            "dbeta": dbeta,
            "inference y": rounded(y, "inference y"),
            "inference dx": rounded(inference_dx, "inference dx"),
        }

    return Case("batch_norm", dtype, label, inputs, run, bounds)


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
