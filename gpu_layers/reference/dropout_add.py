"""A residual and what dropout leaves of a branch, in NumPy: the definition of correct."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.dropout_saved import DropoutAddSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.mask import DropoutMask
from gpu_layers.reference.activation import ACTIVATIONS
from gpu_layers.reference.dropout import chunks, kept_chunks
from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.results import delivered, flat_result
from gpu_layers.reference.select import kept_values

__all__ = ["dropout_add_backward", "dropout_add_forward"]


@ieee
def dropout_add_forward(
    x: np.ndarray,
    bias: np.ndarray | None,
    residual: np.ndarray,
    activation: str,
    mask: DropoutMask,
    scale: float,
    dropout_first: bool,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """``residual + D(phi(x + bias))``, or ``residual + phi(D(x + bias))`` if ``dropout_first``.

    Parameters
    ----------
    x, residual : ndarray
        One shape and dtype.
    bias : ndarray, shape (x.shape[-1],), or None
        Of the accumulation dtype.
    activation : str
        A name in ``ACTIVATIONS``; one that is not exact is computed in float64, and all that follows.
    mask : DropoutMask
    scale : float
        Of what is kept, rounded to the accumulation dtype.
    dropout_first : bool
    out : ndarray, optional
        Array to fill; may be x or residual.

    Returns
    -------
    y : ndarray
        x's shape and dtype.
    gradient_bits : ndarray of uint8, shape (ceil(size / 8),), or None
        For ReLU: bit ``i & 7`` of byte ``i >> 3`` is set where element i is kept and not clipped.
    """
    phi = ACTIVATIONS[activation]
    y = flat_result(out, x)
    passes = np.empty(x.size, bool) if activation == "relu" else None
    source, added, target = (np.ascontiguousarray(one).reshape(-1) for one in (x, residual, y))
    accumulate = accumulation_dtype(x.dtype).type
    factor = accumulate(scale)
    for chunk, kept in kept_chunks(mask, x.size):
        values = _biased(source, bias, chunk, accumulate)
        if passes is not None:
            passes[chunk] = kept & ~(values <= 0)
        if dropout_first:
            values = kept_values(values * factor, kept)
        values = phi.forward_of(values, x.dtype)
        if not dropout_first:
            values = kept_values(values * factor, kept)
        target[chunk] = values + added[chunk].astype(accumulate)
    return delivered(y, out), None if passes is None else np.packbits(passes, bitorder="little")


@ieee
def dropout_add_backward(
    dy: np.ndarray, saved: DropoutAddSaved, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gradients of x and of the bias; that of the residual is dy.

    Parameters
    ----------
    dy : ndarray
    saved : DropoutAddSaved
        ``x`` is None where the gradient does not depend on it: for ReLU, whose bits the forward left, and identity.
    out : ndarray, optional
        Array to fill with dx.

    Returns
    -------
    dx : ndarray
        ``scale * phi'(z) * dy``, or ``scale * phi'(scale * z) * dy`` if ``dropout_first``, with ``z = x + bias``, where
        kept; +0 elsewhere.
    dbias : ndarray, shape (dy.shape[-1],), or None
        Sums of dx, before it is rounded; of the accumulation dtype.
    """
    phi = ACTIVATIONS[saved.activation]
    dx = flat_result(out, dy)
    accumulate = accumulation_dtype(dy.dtype).type
    factor = accumulate(saved.dropout.scale)
    gradients, target = np.ascontiguousarray(dy).reshape(-1), dx.reshape(-1)
    source = None if saved.x is None else np.ascontiguousarray(saved.x).reshape(-1)
    features = dy.shape[-1] if dy.ndim else 1
    total = np.zeros(features, np.float64)
    pieces = (
        kept_chunks(saved.dropout.mask, dy.size)
        if saved.gradient_bits is None
        else ((chunk, _passing(saved.gradient_bits, chunk)) for chunk in chunks(dy.size))
    )
    for chunk, kept in pieces:
        result = gradients[chunk].astype(accumulate) * factor
        if source is not None:
            values = _biased(source, saved.bias, chunk, accumulate)
            if saved.is_first:
                values = values * factor
            result = result * phi.derivative_of(values, dy.dtype)
        result = kept_values(result, kept)
        target[chunk] = result
        if saved.has_bias:
            total += np.bincount(np.arange(chunk.start, chunk.stop) % features, result, features)
    return delivered(dx, out), total.astype(accumulate) if saved.has_bias else None


def _biased(source: np.ndarray, bias: np.ndarray | None, chunk: slice, accumulate: type[np.floating]) -> np.ndarray:
    values = source[chunk].astype(accumulate)
    if bias is not None:
        values += bias[np.arange(chunk.start, chunk.stop) % bias.size]
    return values


def _passing(gradient_bits: np.ndarray, chunk: slice) -> np.ndarray:
    bits = gradient_bits[chunk.start // 8 : -(-chunk.stop // 8)]
    return np.unpackbits(bits, count=chunk.stop - chunk.start, bitorder="little").astype(bool)
