"""Batch normalisation as stateless pairs: with the statistics of the batch, and with given ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_layers.ops.checks import check_activation, check_dtype, check_eps, check_gradient, described
from gpu_layers.reference.batch_norm import statistics_dtype
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.cuda import array_module
from gpu_layers.runtime.writes import check_unwritten, write_count


@dataclass(frozen=True)
class BatchNormSaved:
    """What backward needs.

    Attributes
    ----------
    x : array
        The input itself: what this library writes to it before backward is noticed there.
    gamma, beta : array, shape (C,), or None
        Copies, which a step of an optimizer does not change. beta is the caller's own where no backward reads it:
        without an activation.
    mean, var, inv_std : array, shape (C,)
        Of the batch in training (``var`` is the biased variance), copies of what was given in inference;
        ``inv_std = 1 / sqrt(var + eps)``. float64 for float64 input, float32 for all others.
    channels_last : bool
    residual : array or None
        What was added before the activation, itself; the input of the activation is computed again from this and x.
    activation : str
    writes : int
        :func:`write_count` of the forward.
    """

    x: Any
    gamma: Any
    beta: Any
    mean: Any
    var: Any
    inv_std: Any
    channels_last: bool
    residual: Any = None
    activation: str = "identity"
    writes: int = field(default_factory=write_count)

    def check_unwritten(self) -> None:
        """RuntimeError if this library has written to what backward reads, since the forward."""
        residual = None if self.activation == "identity" else self.residual
        check_unwritten(self.writes, x=self.x, residual=residual)

    @property
    def count(self) -> int:
        """Values a channel."""
        return self.x.size // max(self.mean.size, 1)


def batch_norm_forward(
    x: Any,
    gamma: Any,
    beta: Any,
    *,
    eps: float = 1e-5,
    residual: Any = None,
    activation: str | None = None,
    channels_last: bool = False,
) -> tuple[Any, BatchNormSaved]:
    """Normalise each channel with its own mean and biased variance over the batch; then add, then activate.

    ``y = phi(gamma * (x - mean) / sqrt(var + eps) + beta + residual)`` (Ioffe and Szegedy, 2015).

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
        float16, bfloat16, float32 or float64. An empty batch gives an empty result.
    gamma, beta : array, shape (C,), or None
        float64 if x is, float32 for all others.
    eps : float
        Greater than 0, also as a number of the statistics' dtype, to which it is rounded.
    residual : array, optional
        x's shape and dtype.
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        phi, as in :func:`activation_dropout_forward`; None is the identity.
    channels_last : bool

    Returns
    -------
    y : array
        x's shape and dtype.
    saved : BatchNormSaved

    Raises
    ------
    TypeError
        For a wrong array type or dtype.
    ValueError
        For a wrong shape, an unknown activation, or one value a channel, whose variance does not exist.
    """
    backend_for(x, optional=(gamma, beta, residual))
    channels, activation = check_input(x, gamma, beta, channels_last, residual, activation)
    eps = check_eps(eps, statistics_dtype(x.dtype))
    check_count(x, channels)
    return checked_forward(x, gamma, beta, eps, residual, activation, channels_last)


def checked_forward(
    x: Any,
    gamma: Any,
    beta: Any,
    eps: float,
    residual: Any,
    activation: str,
    channels_last: bool,
    out: Any = None,
) -> tuple[Any, BatchNormSaved]:
    """:func:`batch_norm_forward` of what has been checked; y is written to ``out``, if there is one."""
    if x.size == 0:
        y = array_module(x).empty(x.shape, x.dtype) if out is None else out
        mean, var, inv_std = _statistics_of_nothing(x, x.shape[-1 if channels_last else 1], eps)
    else:
        y, mean, var, inv_std = backend_for(x).batch_norm_forward(
            x, gamma, beta, eps, channels_last, residual=residual, activation=activation, out=out
        )
    gamma, beta = saved_affine(gamma, beta, activation)
    return y, BatchNormSaved(x, gamma, beta, mean, var, inv_std, channels_last, residual, activation)


def saved_affine(gamma: Any, beta: Any, activation: str) -> tuple[Any, Any]:
    """gamma and beta as a backward keeps them: copies of what it reads."""
    gamma = None if gamma is None else gamma.copy()
    return gamma, beta if beta is None or activation == "identity" else beta.copy()


def batch_norm_backward(dy: Any, saved: BatchNormSaved) -> tuple[Any, ...]:
    """Gradients of :func:`batch_norm_forward`.

    With ``xhat = (x - mean) * inv_std``, m values a channel and ``dz = phi'(gamma * xhat + beta + residual) * dy``:
    ``dbeta = sum dz``, ``dgamma = sum dz * xhat``,
    ``dx = gamma * inv_std * (dz - dbeta / m - xhat * dgamma / m)``, ``dresidual = dz``.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : BatchNormSaved

    Returns
    -------
    dx : array
    dgamma, dbeta : array, shape (C,)
        Also where gamma and beta are None.
    dresidual : array
        Only if there was a residual.

    Raises
    ------
    TypeError, ValueError
        Unless dy has y's dtype and shape.
    RuntimeError
        If this library has written to x, or to a residual that an activation's gradient needs, since the forward.
    """
    return batch_norm_backward_into((None, None), dy, saved)


def batch_norm_backward_into(out: tuple[Any, Any], dy: Any, saved: BatchNormSaved) -> tuple[Any, ...]:
    """:func:`batch_norm_backward` that writes dx and dresidual to these arrays, where they are not None."""
    return _backward("batch_norm_backward", dy, saved, out=out)


def batch_norm_inference(
    x: Any,
    mean: Any,
    var: Any,
    gamma: Any,
    beta: Any,
    *,
    eps: float = 1e-5,
    residual: Any = None,
    activation: str | None = None,
    channels_last: bool = False,
) -> tuple[Any, BatchNormSaved]:
    """Normalise each channel with a given mean and variance; then add, then activate.

    Parameters
    ----------
    x, gamma, beta, eps, residual, activation, channels_last
        As in :func:`batch_norm_forward`; one value a channel is fine here.
    mean, var : array, shape (C,)
        Such as running averages.

    Returns
    -------
    y : array
    saved : BatchNormSaved
    """
    backend = backend_for(x, mean, var, optional=(gamma, beta, residual))
    channels, activation = check_input(x, gamma, beta, channels_last, residual, activation)
    check_statistics(x, mean, var, channels)
    inv_std = inverse_deviation(var, check_eps(eps, var.dtype))
    if x.size:
        y = backend.batch_norm_inference(
            x, mean, inv_std, gamma, beta, channels_last, residual=residual, activation=activation
        )
    else:
        y = array_module(x).empty(x.shape, x.dtype)
    gamma, beta = saved_affine(gamma, beta, activation)
    return y, BatchNormSaved(x, gamma, beta, mean.copy(), var.copy(), inv_std, channels_last, residual, activation)


def batch_norm_inference_backward(dy: Any, saved: BatchNormSaved) -> tuple[Any, ...]:
    """Gradients of :func:`batch_norm_inference`: the statistics are constants, so ``dx = gamma * inv_std * dz``.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As :func:`batch_norm_backward`.
    """
    return _backward("batch_norm_inference_backward", dy, saved)


def _backward(name: str, dy: Any, saved: BatchNormSaved, **options: Any) -> tuple[Any, ...]:
    backend = backend_for(dy, saved.x)
    check_gradient(dy, saved.x.shape, saved.x.dtype)
    saved.check_unwritten()
    if saved.x.size == 0:
        xp = array_module(dy)
        zeros = [xp.zeros(saved.mean.shape, saved.mean.dtype) for _ in range(2)]
        dx, dresidual = (xp.empty(dy.shape, dy.dtype) for _ in range(2))
        gradients = (dx, *zeros, dresidual)
    else:
        gradients = getattr(backend, name)(
            dy,
            saved.x,
            saved.mean,
            saved.inv_std,
            saved.gamma,
            saved.beta,
            saved.channels_last,
            residual=saved.residual,
            activation=saved.activation,
            **options,
        )
    return gradients[:3] if saved.residual is None else gradients


def _statistics_of_nothing(x: Any, channels: int, eps: float) -> tuple[Any, Any, Any]:
    xp, dtype = array_module(x), statistics_dtype(x.dtype)
    return xp.zeros(channels, dtype), xp.zeros(channels, dtype), xp.full(channels, eps**-0.5, dtype)


def inverse_deviation(var: Any, eps: float) -> Any:
    """``1 / sqrt(var + eps)`` of given variances, rounded once."""
    return (1 / array_module(var).sqrt(var.astype(np.float64) + eps)).astype(var.dtype)


def check_input(
    x: Any, gamma: Any, beta: Any, channels_last: bool, residual: Any, activation: str | None
) -> tuple[int, str]:
    """Number of channels, and the activation's name."""
    check_dtype(x)
    if x.ndim < 2:
        raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")
    channels = x.shape[-1] if channels_last else x.shape[1]
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        if parameter is not None:
            _check_parameter(parameter, name, channels, x)
    _check_residual(residual, x)
    return channels, "identity" if activation is None else check_activation(activation)


def check_count(x: Any, channels: int) -> None:
    """Raise for a single value a channel, which has no variance."""
    if x.size == channels and channels:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")


def check_statistics(x: Any, mean: Any, var: Any, channels: int) -> None:
    """Raise unless given statistics have x's number of channels, and their dtype."""
    _check_parameter(mean, "mean", channels, x)
    _check_parameter(var, "var", channels, x)


def _check_residual(residual: Any, x: Any) -> None:
    """Raise unless the residual, if there is one, has x's dtype and shape."""
    if residual is None:
        return
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have the input's dtype {x.dtype}, got {described(residual.dtype)}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have the input's shape {list(x.shape)}, got {list(residual.shape)}")


def _check_parameter(parameter: Any, name: str, channels: int, x: Any) -> None:
    dtype = statistics_dtype(x.dtype)
    if parameter.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for {x.dtype} input, got {described(parameter.dtype)}")
    if parameter.ndim != 1:
        raise ValueError(f"{name} should have one axis, got shape {list(parameter.shape)}")
    if parameter.size != channels:
        raise ValueError(f"{name} should contain {channels} elements not {parameter.size}")
