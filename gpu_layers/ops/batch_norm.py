"""Batch normalisation as stateless pairs: by the statistics of the batch, and by given ones."""

from __future__ import annotations

from types import ModuleType

from gpu_layers.core.array import Array
from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.core.writes import write_count
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_activation, check_dtype, check_eps, check_gradient, check_residual, described
from gpu_layers.ops.output import claim, claim_elementwise, zeros
from gpu_layers.runtime.backend import backend_for

__all__ = [
    "BatchNormSaved",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
]


def batch_norm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    *,
    eps: float = 1e-5,
    residual: Array = None,
    activation: str | None = None,
    channels_last: bool = False,
    out: Array = None,
) -> tuple[Array, BatchNormSaved]:
    """Normalise each channel by its mean and biased variance over the batch; then add the residual; then activate.

    ``y = phi(gamma * (x - mean) / sqrt(var + eps) + beta + residual)`` (Ioffe and Szegedy, 2015).

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
        float16, bfloat16, float32 or float64. An empty batch gives an empty result.
    gamma, beta : array, shape (C,), or None
        float64 if x is, float32 for all others.
    eps : float
        Positive, also after rounding to the dtype of the statistics.
    residual : array, optional
        x's shape and dtype.
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        phi, as in :func:`activation_dropout_forward`; None is the identity.
    channels_last : bool
    out : array, optional
        Where to write y; must not overlap x or residual.

    Returns
    -------
    y : array
        x's shape and dtype.
    saved : BatchNormSaved
        For :func:`batch_norm_backward`.

    Raises
    ------
    TypeError
        For a wrong array type or dtype.
    ValueError
        For a wrong shape, an eps that is not positive, an unknown activation, an out that cannot take the result, or a
        single value per channel, which has no variance.
    """
    backend = backend_for(x, optional=(gamma, beta, residual, out))
    phi, eps = _checked_forward((x, gamma, beta, residual), activation, channels_last, eps)
    if out is not None:
        claim(out, x.shape, x.dtype, x, residual)
    return checked_forward(backend, x, gamma, beta, eps, residual, phi, channels_last, out)


@Checked
def _checked_forward(
    arrays: tuple[Array, ...], activation: str | None, channels_last: bool, eps: float
) -> tuple[str, float]:
    """The activation's name, and eps."""
    x, gamma, beta, residual = arrays
    channels, phi = check_input(x, gamma, beta, channels_last, residual, activation)
    eps = check_eps(eps, accumulation_dtype(x.dtype))
    check_count(x, channels)
    return phi, eps


@Checked
def _checked_inference(
    arrays: tuple[Array, ...], activation: str | None, channels_last: bool, eps: float
) -> tuple[str, float]:
    """The activation's name, and eps."""
    x, mean, var, gamma, beta, residual = arrays
    channels, phi = check_input(x, gamma, beta, channels_last, residual, activation)
    check_statistics(x, mean, var, channels)
    return phi, check_eps(eps, var.dtype)


def checked_forward(
    backend: ModuleType,
    x: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    residual: Array,
    activation: str,
    channels_last: bool,
    out: Array = None,
    running: RunningStatistics | None = None,
    valid: ValidPositions | None = None,
    statistics: Array = None,
) -> tuple[Array, BatchNormSaved]:
    """:func:`batch_norm_forward` of checked arguments.

    If they are given, y is written to ``out``, the statistics to ``statistics`` and folded into ``running``, and only
    the positions in ``valid`` count: y is +0 at others.
    """
    if x.size == 0 or (valid is not None and valid.count == 0):
        with place_of(x):
            y = zeros(x, out)
            statistics = _statistics_of_nothing(x, x.shape[-1 if channels_last else 1], eps, statistics)
            if running is not None:
                running.batches[...] += 1
    else:
        y, statistics = backend.batch_norm_forward(
            x, gamma, beta, eps, channels_last, residual, activation, running, out, valid, statistics
        )
    return y, BatchNormSaved(x, statistics, channels_last, residual, activation, write_count(), valid)


def batch_norm_backward(dy: Array, saved: BatchNormSaved, *, out: Array = None) -> tuple[Array, ...]:
    """Gradients of :func:`batch_norm_forward`.

    With ``xhat = (x - mean) * inv_std``, m values per channel and ``dz = phi'(gamma * xhat + beta + residual) * dy``:
    ``dbeta = sum dz``, ``dgamma = sum dz * xhat``,
    ``dx = gamma * inv_std * (dz - dbeta / m - xhat * dgamma / m)``, ``dresidual = dz``.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : BatchNormSaved
    out : array, optional
        Where to write dx; may be dy, must not overlap x or the residual.

    Returns
    -------
    dx : array
    dgamma, dbeta : array, shape (C,)
        Also if gamma and beta are None.
    dresidual : array
        Only if there was a residual.

    Raises
    ------
    TypeError
        If dy has another array type or dtype than y.
    ValueError
        If dy has another shape than y, or out cannot take the result.
    RuntimeError
        If this library has written since the forward to x, or to a residual that the activation's gradient needs.
    """
    return _backward("batch_norm_backward", dy, saved, out)


#: Activations whose derivative is constant on either side of 0.
STRAIGHT = ("identity", "relu", "leaky_relu")


def batch_norm_double_backward(
    ddx: Array,
    ddgamma: Array,
    ddbeta: Array,
    dy: Array,
    saved: BatchNormSaved,
    *,
    ddresidual: Array = None,
    out: Array = None,
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`batch_norm_backward`, which maps dy, x and gamma to dx, dgamma, dbeta and dresidual.

    Parameters
    ----------
    ddx : array or None
        Gradient of dx: x's shape and dtype. None, here and below, is 0.
    ddgamma, ddbeta : array, shape (C,), or None
        Gradients of dgamma and dbeta; of the statistics' dtype.
    dy : array
        As in the backward.
    saved : BatchNormSaved
        Of a forward whose activation is identity, relu or leaky_relu.
    ddresidual : array, optional
        Gradient of dresidual, if there was a residual.
    out : array, optional
        Where to write ddy; may be dy, ddx or ddresidual, must not overlap x or the residual.

    Returns
    -------
    ddy, dx : array
        Gradients of dy and x, with their shape and dtype. The residual only decides where a ReLU clips: it has none.
    dgamma : array, shape (C,)
        Gradient of gamma; beta has none.

    Raises
    ------
    TypeError
        For a wrong array type or dtype.
    ValueError
        For a wrong shape, another activation, a ddresidual without a residual, or an out that cannot take the result.
    RuntimeError
        If this library has written to x or the residual since the forward.
    """
    backend = backend_for(dy, saved.x, optional=(ddx, ddgamma, ddbeta, ddresidual, out))
    of_x, of_channel = (saved.x.shape, saved.x.dtype), (saved.statistics.shape[1:], saved.statistics.dtype)
    check_gradient(dy, *of_x)
    if saved.activation not in STRAIGHT:
        raise ValueError(f"second derivatives need the activation {' or '.join(STRAIGHT)}, got {saved.activation}")
    if ddresidual is not None and saved.residual is None:
        raise ValueError("ddresidual was given, but the forward had no residual")
    given = (("ddx", ddx, of_x), ("ddgamma", ddgamma, of_channel), ("ddbeta", ddbeta, of_channel))
    for name, one, like in (*given, ("ddresidual", ddresidual, of_x)):
        if one is not None and (one.shape, one.dtype) != like:
            shape, dtype = like
            raise (TypeError if one.dtype != dtype else ValueError)(
                f"{name} must be {dtype} of shape {list(shape)}, got {described(one.dtype)} of shape {list(one.shape)}"
            )
    saved.check_unwritten()
    if out is not None:
        dy, ddx, ddresidual = claim_elementwise(out, dy, ddx, ddresidual, apart=(saved.x, saved.residual))
    if ddx is None or ddgamma is None or ddbeta is None or dy.size == 0:
        xp = array_module(dy)
        with place_of(dy):
            if dy.size == 0:
                return zeros(dy, out), zeros(dy), xp.zeros(*of_channel)
            of_given = zip((ddx, ddgamma, ddbeta), (of_x, of_channel, of_channel), strict=True)
            ddx, ddgamma, ddbeta = (xp.zeros(*like) if one is None else one for one, like in of_given)
    return backend.batch_norm_double_backward(ddx, ddgamma, ddbeta, ddresidual, dy, saved, out)


def batch_norm_inference(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    beta: Array,
    *,
    eps: float = 1e-5,
    residual: Array = None,
    activation: str | None = None,
    channels_last: bool = False,
    out: Array = None,
) -> tuple[Array, BatchNormSaved]:
    """Normalise each channel by a given mean and variance; then add the residual; then activate.

    Parameters
    ----------
    x, gamma, beta, eps, residual, activation, channels_last
        As in :func:`batch_norm_forward`; a single value per channel is allowed here.
    mean, var : array, shape (C,)
        Running averages, for example; float64 if x is, float32 for all others.
    out : array, optional
        Where to write y; must not overlap x or residual.

    Returns
    -------
    y : array
        x's shape and dtype.
    saved : BatchNormSaved
        For :func:`batch_norm_inference_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_forward`, and for a mean or variance of a wrong dtype or shape.
    """
    backend = backend_for(x, mean, var, optional=(gamma, beta, residual, out))
    phi, eps = _checked_inference((x, mean, var, gamma, beta, residual), activation, channels_last, eps)
    if out is not None:
        claim(out, x.shape, x.dtype, x, residual)
    return checked_inference(backend, x, mean, var, gamma, beta, eps, residual, phi, channels_last, out)


def checked_inference(
    backend: ModuleType,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    residual: Array,
    activation: str,
    channels_last: bool,
    out: Array = None,
    valid: ValidPositions | None = None,
) -> tuple[Array, BatchNormSaved]:
    """:func:`batch_norm_inference` of what has been checked; ``out`` and ``valid`` as in :func:`checked_forward`."""
    y, statistics = backend.batch_norm_inference(
        x, mean, var, gamma, beta, eps, channels_last, residual, activation, out, valid
    )
    return y, BatchNormSaved(x, statistics, channels_last, residual, activation, write_count(), valid)


def batch_norm_inference_backward(dy: Array, saved: BatchNormSaved, *, out: Array = None) -> tuple[Array, ...]:
    """Gradients of :func:`batch_norm_inference`: the statistics are constants, so ``dx = gamma * inv_std * dz``.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : BatchNormSaved
    out : array, optional
        Where to write dx; may be dy, must not overlap x or the residual.

    Returns
    -------
    dx, dgamma, dbeta, dresidual : array
        As :func:`batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`batch_norm_backward`.
    """
    return _backward("batch_norm_inference_backward", dy, saved, out)


def _backward(name: str, dy: Array, saved: BatchNormSaved, out: Array) -> tuple[Array, ...]:
    backend = backend_for(dy, saved.x, optional=(out,))
    check_gradient(dy, saved.x.shape, saved.x.dtype)
    saved.check_unwritten()
    if out is not None:
        dy = claim_elementwise(out, dy, apart=(saved.x, saved.residual))
    if saved.x.size == 0 or (saved.valid is not None and saved.valid.count == 0):
        with place_of(dy):
            gradients = zeros(dy, out), *[zeros(like) for like in (saved.mean, saved.mean, dy)]
    else:
        gradients = getattr(backend, name)(dy, saved, (out, None, None, None))
    return gradients[:3] if saved.residual is None else gradients


def _statistics_of_nothing(x: Array, channels: int, eps: float, statistics: Array) -> Array:
    """The statistics that an empty batch saves."""
    if statistics is None:
        statistics = array_module(x).empty((5, channels), accumulation_dtype(x.dtype))
    statistics[...] = 0
    statistics[2] = eps**-0.5
    return statistics


def check_input(
    x: Array, gamma: Array, beta: Array, channels_last: bool, residual: Array, activation: str | None
) -> tuple[int, str]:
    """Number of channels, and the activation's name."""
    check_dtype(x)
    if x.ndim < 2:
        raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")
    channels = x.shape[-1] if channels_last else x.shape[1]
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        if parameter is not None:
            _check_parameter(parameter, name, channels, x)
    if residual is not None:
        check_residual(residual, x)
    return channels, "identity" if activation is None else check_activation(activation)


def check_count(x: Array, channels: int, valid: ValidPositions | None = None) -> None:
    """ValueError for a single value per channel, which has no variance."""
    if channels and (x.size == channels if valid is None else valid.count == 1):
        shape = list(x.shape) if valid is None else [1, channels]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def check_statistics(x: Array, mean: Array, var: Array, channels: int) -> None:
    """Raise unless mean and variance have x's number of channels, and the statistics' dtype."""
    _check_parameter(mean, "mean", channels, x)
    _check_parameter(var, "var", channels, x)


def _check_parameter(parameter: Array, name: str, channels: int, x: Array) -> None:
    dtype = accumulation_dtype(x.dtype)
    if parameter.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for {x.dtype} input, got {described(parameter.dtype)}")
    if parameter.ndim != 1:
        raise ValueError(f"{name} should have one axis, got shape {list(parameter.shape)}")
    if parameter.size != channels:
        raise ValueError(f"{name} should contain {channels} elements not {parameter.size}")
