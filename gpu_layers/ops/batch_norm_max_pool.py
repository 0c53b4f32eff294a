"""Batch normalisation, activation and max pooling as stateless pairs; the values in between are never written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.window import Window
from gpu_layers.ops.batch_norm import (
    BatchNormSaved,
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
    check_count,
    check_input,
    check_statistics,
    checked_forward,
)
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_eps, check_gradient
from gpu_layers.ops.max_pool import MaxPoolSaved, max_pool_backward, max_pool_forward
from gpu_layers.ops.output import claim, claim_pooled
from gpu_layers.ops.pool_arguments import Padding, place_window
from gpu_layers.runtime.backend import backend_for

__all__ = [
    "BatchNormMaxPoolSaved",
    "batch_norm_max_pool_backward",
    "batch_norm_max_pool_forward",
    "batch_norm_max_pool_inference",
    "batch_norm_max_pool_inference_backward",
]


@dataclass(slots=True)
class BatchNormMaxPoolSaved:
    """What backward needs. It holds no normalised values.

    Attributes
    ----------
    norm : BatchNormSaved
    pool : MaxPoolSaved
    """

    norm: BatchNormSaved
    pool: MaxPoolSaved


def batch_norm_max_pool_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    ceil_mode: bool = False,
    channels_last: bool = False,
    out: Array = None,
) -> tuple[Array, BatchNormMaxPoolSaved]:
    """:func:`max_pool_forward` of :func:`batch_norm_forward`: the same bits.

    The kernels do not write the normalised values. Where blocks keep planes whole, x is read once; elsewhere the
    statistics read it, and the pooling reads it again.

    Parameters
    ----------
    x, gamma, beta, eps, activation
        As of :func:`batch_norm_forward`.
    kernel_size, stride, padding, dilation, ceil_mode
        As of :func:`max_pool_forward`.
    channels_last : bool
    out : array, optional
        Where to write y; must not overlap x.

    Returns
    -------
    y : array
    saved : BatchNormMaxPoolSaved
        For the backward of the same name.

    Raises
    ------
    TypeError, ValueError
        As both of these.
    """
    arguments = (kernel_size, stride, padding, dilation, eps, activation, ceil_mode, channels_last)
    return batch_norm_max_pool_running(x, gamma, beta, None, *arguments, out=out)


def batch_norm_max_pool_running(
    x: Array,
    gamma: Array,
    beta: Array,
    running: RunningStatistics | None,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None,
    padding: Padding,
    dilation: int | Sequence[int],
    eps: float,
    activation: str | None,
    ceil_mode: bool,
    channels_last: bool,
    out: Array = None,
) -> tuple[Array, BatchNormMaxPoolSaved]:
    """:func:`batch_norm_max_pool_forward` that also folds the statistics into running ones, if given."""
    backend = backend_for(x, optional=(gamma, beta, out))
    window_arguments = (kernel_size, stride, padding, dilation)
    channels, activation, eps, window = _checked(
        (x, gamma, beta), activation, eps, *window_arguments, ceil_mode, channels_last
    )
    if x.size == channels:
        check_count(x, channels)
    if out is not None:
        claim_pooled(out, window.output_shape, True, channels_last, x)
    if x.size == 0:
        normalised, norm = checked_forward(backend, x, gamma, beta, eps, None, activation, channels_last, None, running)
        return _pooled(normalised, norm, window_arguments, ceil_mode, out)
    given = (x, gamma, beta, eps, window, channels_last, activation, running, out)
    y, argmax, statistics = backend.batch_norm_max_pool(*given)
    return y, _saved(x, y, argmax, statistics, window, channels_last, activation)


def batch_norm_max_pool_backward(
    dy: Array, saved: BatchNormMaxPoolSaved, *, out: Array = None
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`batch_norm_max_pool_forward`: the bits of the backwards of its two steps.

    Kernels take the gradient of each normalised value from the windows over it, at most two along height and width
    (``kernel_size <= 2 * stride``), and write nothing in between. Other windows take the two steps.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : BatchNormMaxPoolSaved
    out : array, optional
        Where to write dx; must not overlap dy or x.

    Returns
    -------
    dx : array
    dgamma, dbeta : array, shape (C,)
        As of :func:`batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`batch_norm_backward`.
    """
    return _backward("batch_norm_max_pool_backward", dy, saved, batch_norm_backward, out)


def batch_norm_max_pool_inference(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    beta: Array,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    ceil_mode: bool = False,
    channels_last: bool = False,
    out: Array = None,
) -> tuple[Array, BatchNormMaxPoolSaved]:
    """:func:`max_pool_forward` of :func:`batch_norm_inference`: the same bits, in one kernel.

    Parameters
    ----------
    mean, var : array, shape (C,)
        Running averages, for example.
    x, gamma, beta, kernel_size, stride, padding, dilation, eps, activation, ceil_mode, channels_last, out
        As of :func:`batch_norm_max_pool_forward`.

    Returns
    -------
    y : array
    saved : BatchNormMaxPoolSaved
        For the backward of the same name.

    Raises
    ------
    TypeError, ValueError
        As both of these.
    """
    backend = backend_for(x, mean, var, optional=(gamma, beta, out))
    window_arguments = (kernel_size, stride, padding, dilation)
    _, activation, eps, window = _checked(
        (x, gamma, beta, mean, var), activation, eps, *window_arguments, ceil_mode, channels_last
    )
    if out is not None:
        claim_pooled(out, window.output_shape, True, channels_last, x)
    if x.size == 0:
        normalised, norm = batch_norm_inference(
            x, mean, var, gamma, beta, eps=eps, activation=activation, channels_last=channels_last
        )
        return _pooled(normalised, norm, window_arguments, ceil_mode, out)
    y, argmax, statistics = backend.batch_norm_max_pool_inference(
        x, mean, var, gamma, beta, eps, window, channels_last, activation, out
    )
    return y, _saved(x, y, argmax, statistics, window, channels_last, activation)


def _saved(
    x: Array, y: Array, argmax: Array, statistics: Array, window: Window, channels_last: bool, activation: str
) -> BatchNormMaxPoolSaved:
    norm = BatchNormSaved(x, statistics, channels_last, None, activation)
    return BatchNormMaxPoolSaved(norm, MaxPoolSaved(argmax, window, y.shape, x.dtype, channels_last, True))


def batch_norm_max_pool_inference_backward(
    dy: Array, saved: BatchNormMaxPoolSaved, *, out: Array = None
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`batch_norm_max_pool_inference`; the statistics are constants.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : BatchNormMaxPoolSaved
    out : array, optional
        Where to write dx; must not overlap dy or x.

    Returns
    -------
    dx : array
    dgamma, dbeta : array, shape (C,)
        As of :func:`batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`batch_norm_backward`.
    """
    return _backward("batch_norm_max_pool_inference_backward", dy, saved, batch_norm_inference_backward, out)


def _backward(
    name: str, dy: Array, saved: BatchNormMaxPoolSaved, of_nothing: Callable[..., Any], out: Array
) -> tuple[Array, Array, Array]:
    norm, pool = saved.norm, saved.pool
    backend = backend_for(dy, norm.x, optional=(out,))
    check_gradient(dy, pool.output_shape, pool.dtype)
    norm.check_unwritten()
    if out is not None:
        claim(out, norm.x.shape, norm.x.dtype, dy, norm.x)
    if norm.x.size == 0:
        dx, dgamma, dbeta = of_nothing(max_pool_backward(dy, pool), norm, out=out)
    else:
        dx, dgamma, dbeta = getattr(backend, name)(dy, pool.argmax, pool.window, norm, out)
    return dx, dgamma, dbeta


def _pooled(
    normalised: Array, norm: BatchNormSaved, window_arguments: tuple[Any, ...], ceil_mode: bool, out: Array
) -> tuple[Array, BatchNormMaxPoolSaved]:
    options = {"ceil_mode": ceil_mode, "channels_last": norm.channels_last, "out": out}
    y, pool = max_pool_forward(normalised, *window_arguments, **options)
    return y, BatchNormMaxPoolSaved(norm, pool)


@Checked
def _checked(
    arrays: tuple[Array, ...],
    activation: str | None,
    eps: float,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None,
    padding: Padding,
    dilation: int | Sequence[int],
    ceil_mode: bool,
    channels_last: bool,
) -> tuple[int, str, float, Window]:
    """Number of channels, the activation's name, eps and the window. Given statistics are checked too."""
    x, gamma, beta, *given = arrays
    channels, activation = check_input(x, gamma, beta, channels_last, None, activation)
    if given:
        mean, var = given
        check_statistics(x, mean, var, channels)
    eps = check_eps(eps, accumulation_dtype(x.dtype))
    batched, window = place_window(x, kernel_size, stride, padding, dilation, ceil_mode, channels_last)
    if not batched:
        raise ValueError(f"expected {x.ndim + 1}D input (got {x.ndim}D input)")
    return channels, activation, eps, window
