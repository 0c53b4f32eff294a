"""Bounds of the rounding errors of batch normalisation."""

from __future__ import annotations

import numpy as np

from gpu_layers.catalogue.case import Arrays, epsilon, smallest
from gpu_layers.core.array import Array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.kernels.batch_norm_plan import summation_depth

#: Of each activation its largest slope.
STEEPEST = {"identity": 1.0, "relu": 1.0, "leaky_relu": 1.0, "sigmoid": 0.25, "tanh": 1.0, "gelu": 1.13, "silu": 1.1}
# How fast it changes at most, if it does.
_BENT = {"sigmoid": 0.1, "tanh": 0.77, "gelu": 0.8, "silu": 0.5}


def batch_norm_bounds(
    inputs: Arrays, expected: Arrays, *, channels_last: bool, activation: str | None = None, depth: int | None = None
) -> Arrays:
    """Absolute errors that are allowed, by the names of results.

    Parameters
    ----------
    inputs : dict
        ``x`` and ``dy``; ``gamma``, ``beta`` and ``residual``, if there are any.
    expected : dict
        ``mean`` and ``inv_std``, and the results to bound: of training and, prefixed by
        ``inference``, with the same statistics given.
    channels_last : bool
    activation : str or None
    depth : int, optional
        Additions on the way of a value into a sum; those of the plan for x by default.
    """
    x = inputs["x"].astype(np.float64)
    dy = inputs["dy"].astype(np.float64)
    dtype = inputs["x"].dtype
    parameters = accumulation_dtype(dtype)
    unit, rounding = epsilon(parameters), epsilon(dtype)
    residual, channels = "residual" in inputs, expected["mean"].size
    axes = tuple(axis for axis in range(x.ndim) if axis != (x.ndim - 1 if channels_last else 1))

    def broadcast(values: Array) -> Array:
        return values if channels_last else values.reshape(-1, *[1] * (x.ndim - 2))

    mean = expected["mean"].astype(np.float64)
    deviation = np.abs(x - broadcast(mean))
    spread = deviation.max(axis=axes)
    # A value passes through `depth` additions; each rounds a sum that is below the sum of magnitudes;
    # deviations are taken from a value of the channel, hence at most twice the spread.
    depth = depth or summation_depth(x.shape, dtype, channels_last)
    mean_bound = unit * (np.abs(mean) + 2 * depth * spread)
    var_bound = unit * depth * 4 * spread**2 + mean_bound * spread * unit
    inv_std = expected["inv_std"].astype(np.float64)
    # d(var + eps)^-1/2 = -1/2 (var + eps)^-3/2 d(var), and the few roundings of its evaluation.
    inv_std_bound = 0.5 * inv_std**3 * var_bound + 3 * unit * inv_std
    gamma = inputs["gamma"].astype(np.float64) if "gamma" in inputs else np.ones(channels)
    beta = inputs["beta"].astype(np.float64) if "beta" in inputs else np.zeros(channels)
    scale, scale_bound = np.abs(gamma) * inv_std, np.abs(gamma) * (inv_std_bound + unit * inv_std)

    def rounded(error: Array, result: str) -> Array:
        stored = rounding * np.abs(expected[result].astype(np.float64)) if dtype != parameters else 0
        return error + stored + smallest(dtype)

    z_bound = broadcast(scale_bound) * deviation + broadcast(scale * mean_bound)
    z_bound = z_bound + 3 * unit * (broadcast(scale) * (deviation + unit * np.abs(x)) + broadcast(np.abs(beta)))
    z = (x - broadcast(mean)) * broadcast(gamma * inv_std) + broadcast(beta)
    if residual:
        r = inputs["residual"].astype(np.float64)
        z, z_bound = z + r, z_bound + 2 * unit * (np.abs(z) + np.abs(r))
    phi = activation or "identity"
    # The activation passes the error of its input on, and adds those of its own functions, which activation.cuh
    # names: below 16 units of the result, but for that of gelu, magnified by up to z**2.
    own = 0.0 if phi not in _BENT else unit * (16 + np.minimum(z * z, 1e3)) * (1 + np.abs(z))
    y = STEEPEST[phi] * z_bound + own
    if phi in _BENT and dtype != parameters:
        # Polynomials: a tenth of a unit of the half type (half_activation.cuh), also of the slope, which is added up.
        own = own + 0.1 * rounding * STEEPEST[phi]
    # So does its derivative; that of relu is a step where z is 0, which the error of z may cross.
    dz_bound = np.abs(dy) * (_BENT.get(phi, 0.0) * z_bound + own)
    if phi in ("relu", "leaky_relu"):
        dz_bound = dz_bound + np.where(np.abs(z) <= z_bound, np.abs(dy), unit * np.abs(dy))
    # Gradients: the same reasoning for the sums of |dz| and |dz| |x - mean|. The reference sums in float64 but
    # of 1 + unit, which is the rounding of the result.
    dy = dy * STEEPEST[phi]
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
    statistics = {"mean": mean_bound, "var": var_bound + smallest(parameters), "inv_std": inv_std_bound}
    of_channels = {"dgamma": dgamma, "dbeta": dbeta}
    of_elements = {
        "y": y,
        "dx": dx,
        "dresidual": dz_bound,
        "inference y": y,
        "inference dx": inference_dx,
        "inference dresidual": dz_bound,
    }
    of_elements = {name: rounded(bound, name) for name, bound in of_elements.items() if name in expected}
    return {**statistics, **of_channels, **of_elements}
