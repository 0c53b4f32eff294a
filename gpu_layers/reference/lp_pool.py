"""Power-average pooling in NumPy: the definition of correct."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.window import Window
from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.max_pool import max_pool_backward, max_pool_forward
from gpu_layers.reference.pool_taps import (
    CompensatedSum,
    by_samples,
    covering_windows,
    divisors,
    window_taps,
    with_spatial,
)
from gpu_layers.reference.results import delivered

__all__ = ["lp_pool_backward", "lp_pool_forward"]


@ieee
def lp_pool_forward(
    x: np.ndarray, window: Window, norm_type: float, channels_last: bool = False, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """``(c sum |x|^p)^(1/p)`` of each window; the largest ``|x|`` for p = inf.

    c is the number of taps of a window over those within the padded extent: 1, but for windows that ceil mode cuts
    off.

    Parameters
    ----------
    x : ndarray, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
    window : Window
    norm_type : float
        p.
    channels_last : bool

    Returns
    -------
    y : ndarray
        C-contiguous, x's dtype; 0 for a window with no tap inside the input.
    argmax : ndarray or None
        For p = inf, which tap won, as :func:`max_pool_forward` says.
    """
    inputs = math.prod(x.shape[1:])
    if np.isinf(norm_type):
        y, argmax = by_samples(lambda part, own: _largest(part, window, channels_last), (x,), None, inputs)
        return delivered(y, out), argmax
    if norm_type == 1:
        y = by_samples(lambda part, own: _sums_of_sizes(part, window, channels_last), (x,), None, inputs)
    else:
        y = by_samples(lambda part, own: _norms(part, window, norm_type, channels_last), (x,), None, inputs)
    return delivered(y, out), None


def _wide(dtype: np.dtype) -> type[np.floating]:
    """What powers are computed in, which multiply relative errors by p: of more bits than the dtype has.

    Of float64 that is what the processor has, 11 bits more (x86), or none.
    """
    return np.longdouble if dtype == np.float64 else np.float64


def _largest(x: np.ndarray, window: Window, channels_last: bool) -> tuple[np.ndarray, np.ndarray]:
    y, argmax = max_pool_forward(np.abs(x), window, channels_last)
    return np.maximum(y, y.dtype.type(0)), argmax


def _sums_of_sizes(x: np.ndarray, window: Window, channels_last: bool) -> np.ndarray:
    total = CompensatedSum(with_spatial(x.shape, window.output_shape, channels_last), _wide(x.dtype))
    for *__, outputs, inputs in window_taps(window, channels_last):
        total.add(outputs, np.abs(x[inputs]))
    return (_share(window, channels_last) * total.value()).astype(x.dtype, copy=False)


def _norms(x: np.ndarray, window: Window, norm_type: float, channels_last: bool) -> np.ndarray:
    largest, scale, _, norms = _scaled_norms(x, window, norm_type, channels_last)
    # A window of zeros, or with an infinity or NaN, is its largest.
    return np.where(_is_finite(largest), scale.undo(norms), largest).astype(x.dtype)


def _slopes(x: np.ndarray, window: Window, norm_type: float, channels_last: bool) -> tuple[np.ndarray, _Scale]:
    """``c (y / s)^(1-p)``, by which ``(|x| / s)^(p-1)`` is the derivative of y, and s."""
    largest, scale, sums, norms = _scaled_norms(x, window, norm_type, channels_last)
    np.divide(norms, sums, out=norms)
    norms *= _share(window, channels_last)
    # Of a window with an infinity only that one's derivative is not a number.
    return np.where(_is_finite(largest), norms, np.where(np.isnan(largest), np.nan, 0)), scale


def _is_finite(largest: np.ndarray) -> np.ndarray:
    return (largest > 0) & np.isfinite(largest)


def _scaled_norms(
    x: np.ndarray, window: Window, norm_type: float, channels_last: bool
) -> tuple[np.ndarray, _Scale, np.ndarray, np.ndarray]:
    """The largest ``|x|``, by what powers are scaled, their sums and the norms."""
    shape = with_spatial(x.shape, window.output_shape, channels_last)
    largest = np.zeros(shape, x.dtype)
    for *__, outputs, inputs in window_taps(window, channels_last):
        largest[outputs] = np.maximum(largest[outputs], np.abs(x[inputs]))
    scale, total = _Scale(largest, norm_type), CompensatedSum(shape, _wide(x.dtype))
    for *__, outputs, inputs in window_taps(window, channels_last):
        total.add(outputs, scale.apply(np.abs(x[inputs]), outputs) ** norm_type)
    share = _share(window, channels_last)
    sums = share * total.value()
    return largest, scale, sums, np.sqrt(sums) if norm_type == 2 else sums ** (1 / sums.dtype.type(norm_type))


class _Scale:
    """What brings the largest of each window to 1, or, for float64 and a p of at most 900, to [1, 2) by a power of two,
    so that no quotient is rounded."""

    def __init__(self, largest: np.ndarray, norm_type: float) -> None:
        self._largest = largest.astype(_wide(largest.dtype))
        exact = largest.dtype == np.float64 and norm_type <= 900
        self._exponent = np.frexp(np.where(np.isfinite(largest), largest, 1))[1] - 1 if exact else None

    def apply(self, sizes: np.ndarray, outputs: tuple) -> np.ndarray:
        if self._exponent is None:
            return sizes / self._largest[outputs]
        return np.ldexp(sizes.astype(self._largest.dtype), -self._exponent[outputs])

    def undo(self, norms: np.ndarray) -> np.ndarray:
        return norms * self._largest if self._exponent is None else np.ldexp(norms, self._exponent)


def _share(window: Window, channels_last: bool) -> np.ndarray:
    return window.taps / divisors(window, True, None, channels_last, np.dtype(np.float64))


@ieee
def lp_pool_backward(
    dy: np.ndarray,
    x: np.ndarray,
    argmax: np.ndarray | None,
    window: Window,
    norm_type: float,
    channels_last: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """``sign(x) |x|^(p-1) sum(dy c y^(1-p))`` over the windows of each element; 0 where x is 0.

    Parameters
    ----------
    dy : ndarray
        Shape of the output.
    x, argmax : ndarray or None
        What forward took and gave.
    window : Window
    norm_type : float
    channels_last : bool

    Returns
    -------
    dx : ndarray
        C-contiguous, dy's dtype. Contributions are added in the order of the taps.
    """
    inputs = math.prod(x.shape[1:])
    dx = by_samples(
        lambda dy, x, argmax, own: _backward(dy, x, argmax, window, norm_type, channels_last),
        (dy, x, argmax),
        None,
        inputs,
    )
    return delivered(dx, out)


def _backward(
    dy: np.ndarray, x: np.ndarray, argmax: np.ndarray | None, window: Window, norm_type: float, channels_last: bool
) -> np.ndarray:
    if argmax is not None:
        dx = max_pool_backward(dy.astype(np.float64), argmax, window, channels_last)
    else:
        wide = _wide(dy.dtype)
        scale, slopes = None, np.broadcast_to(_share(window, channels_last), dy.shape)
        if norm_type != 1:
            slopes, scale = _slopes(x, window, norm_type, channels_last)
        dx = np.zeros(with_spatial(dy.shape, window.input_shape, channels_last), wide)
        for *__, outputs, inputs in covering_windows(window, channels_last):
            slope = slopes[outputs].astype(wide)
            if scale is not None:
                slope = slope * scale.apply(np.abs(x[inputs]), outputs) ** (norm_type - 1)
            dx[inputs] += dy[outputs] * slope
    # Not by the sign alone: 0 times an infinite gradient is not a number.
    signs = x.astype(np.float64)
    dx *= np.sign(signs, out=signs)
    dx[x == 0] = 0
    return dx.astype(dy.dtype)
