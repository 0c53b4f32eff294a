"""Launching ``batch_norm_double_backward.cu``."""

from __future__ import annotations

from gpu_layers.core.array import Array
from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, delivered, destination, empty, ready
from gpu_layers.kernels.batch_norm_common import LayoutKernel, Normalization, merge, workspace
from gpu_layers.kernels.batch_norm_plan import elementwise_plan
from gpu_layers.runtime.kernel import Arguments, KernelTemplate, combinations
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["batch_norm_double_backward"]

_SOURCE = "batch_norm_double_backward.cu"
# ``DoubleSums`` and ``DoubleCoefficients``.
_SUMS, _COEFFICIENTS = 5, 6
_SUMMATION = LayoutKernel(_SOURCE, "batch_norm_double_sums")
_MERGE = KernelTemplate(_SOURCE, "batch_norm_double_merge", combinations(A=ACCUMULATE_TYPES))
_GRADIENT = LayoutKernel(_SOURCE, "batch_norm_double_gradient")


def batch_norm_double_backward(
    ddx: Array,
    ddgamma: Array,
    ddbeta: Array,
    ddresidual: Array | None,
    dy: Array,
    saved: BatchNormSaved,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """``gpu_layers.reference.batch_norm_double_backward``, as kernels."""
    operands = (ddx, ddgamma, ddbeta, ddresidual, dy, saved.x, saved.statistics, saved.residual, out)
    return _double_backward(operands, (saved.channels_last, saved.activation))


@Launcher
def _double_backward(operands: Operands, numbers: Numbers, channels_last: bool, activation: str) -> Array:
    ddx, ddgamma, ddbeta, ddresidual, dy, x, statistics, residual, out = operands
    ddx, ddgamma, ddbeta, dy, x = (ready(one) for one in (ddx, ddgamma, ddbeta, dy, x))
    ddresidual = None if ddresidual is None else ready(ddresidual)
    norm = Normalization.of(statistics, residual, activation)
    plan, dtype = elementwise_plan(x.shape, x.dtype.itemsize, channels_last), accumulation_dtype(x.dtype)
    partial_sums = workspace(plan, _SUMS, dtype, x)
    coefficients, dgamma = empty((_COEFFICIENTS, plan.channels), dtype, x), empty((plan.channels,), dtype, x)
    results = (ddgamma, ddbeta, coefficients, dgamma, 1 / plan.count)
    arguments: Arguments = (ddx, dy, x, norm.residual, partial_sums, *norm.of_channels, *results, norm.number)
    _SUMMATION.launch(plan, x, arguments)
    merge(plan, _MERGE, dtype, (partial_sums, norm.inv_std, norm.gamma, *results))
    ddy, dx = destination(out, x), empty(x.shape, x.dtype, x)
    arguments = (ddx, ddresidual, dy, x, norm.residual, ddy, dx, *norm.of_channels, coefficients, norm.number)
    _GRADIENT.launch(plan, x, arguments)
    return delivered(ddy, out), dx, dgamma
