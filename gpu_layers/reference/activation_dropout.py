"""Activation and dropout in one pass, in NumPy: the definition of correct."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.mask import DropoutMask
from gpu_layers.reference.activation import ACTIVATIONS
from gpu_layers.reference.dropout import chunks, kept_chunks
from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.results import delivered, flat_result
from gpu_layers.reference.select import kept_values

__all__ = ["activation_dropout_backward", "activation_dropout_forward", "relu_dropout_backward"]


@ieee
def activation_dropout_forward(
    x: np.ndarray,
    activation: str,
    mask: DropoutMask,
    scale: float,
    dropout_first: bool,
    channels_last: bool = False,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """``D(phi(x))``, or ``phi(D(x))`` if ``dropout_first``, where D drops and scales kept elements.

    Parameters
    ----------
    x : ndarray
        Any floating dtype and layout.
    activation : str
        A name in ``ACTIVATIONS``.
    mask : DropoutMask
        Of single elements.
    scale : float
        Rounded to the accumulation dtype, in which x is scaled; an activation that is not exact is computed in
        float64.
    dropout_first : bool
    channels_last : bool
        x is (N, *spatial, C), and the mask is that of (N, C, *spatial).
    out : ndarray, optional
        Array to fill; may be ``x`` itself.

    Returns
    -------
    y : ndarray
        x's shape and dtype.
    gradient_bits : ndarray of uint8, shape (ceil(size / 8),), or None
        For ReLU, unless channels_last: bit ``i & 7`` of byte ``i >> 3`` is set where element i is kept and not clipped.
    """
    if channels_last:
        y, _ = activation_dropout_forward(np.moveaxis(x, -1, 1), activation, mask, scale, dropout_first)
        return delivered(np.ascontiguousarray(np.moveaxis(y, 1, -1)), out), None
    phi = ACTIVATIONS[activation]
    y = flat_result(out, x)
    bits = np.empty(-(-x.size // 8), np.uint8) if activation == "relu" else None
    source, target = np.ascontiguousarray(x).reshape(-1), y.reshape(-1)
    accumulate, factor = _accumulate(x, scale)
    for chunk, kept in kept_chunks(mask, x.size):
        values = source[chunk].astype(accumulate)
        if bits is not None:
            bits[chunk.start // 8 : -(-chunk.stop // 8)] = np.packbits(kept & ~(values <= 0), bitorder="little")
        if dropout_first:
            values = kept_values(values * factor, kept)
        values = phi.forward_of(values, x.dtype)
        if not dropout_first:
            values = kept_values(values * factor, kept)
        target[chunk] = values
    return delivered(y, out), bits


@ieee
def activation_dropout_backward(
    dy: np.ndarray,
    x: np.ndarray,
    activation: str,
    mask: DropoutMask,
    scale: float,
    dropout_first: bool,
    channels_last: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """``scale * phi'(x) * dy``, or ``scale * phi'(scale * x) * dy`` if ``dropout_first``, where kept.

    +0 elsewhere, and where ReLU clips, whatever dy is. ``out`` may be dy.
    """
    if channels_last:
        dy, x = np.moveaxis(dy, -1, 1), np.moveaxis(x, -1, 1)
        dx = activation_dropout_backward(dy, x, activation, mask, scale, dropout_first)
        return delivered(np.ascontiguousarray(np.moveaxis(dx, 1, -1)), out)
    phi = ACTIVATIONS[activation]
    dx = flat_result(out, dy)
    gradients, source, target = (
        np.ascontiguousarray(dy).reshape(-1),
        np.ascontiguousarray(x).reshape(-1),
        dx.reshape(-1),
    )
    accumulate, factor = _accumulate(x, scale)
    for chunk, kept in kept_chunks(mask, x.size):
        values = source[chunk].astype(accumulate)
        if dropout_first:
            values *= factor
        slope = phi.derivative_of(values, x.dtype)
        if activation == "relu":
            kept = kept & (slope != 0)
        target[chunk] = kept_values(gradients[chunk].astype(accumulate) * factor * slope, kept)
    return delivered(dx, out)


@ieee
def relu_dropout_backward(
    dy: np.ndarray, gradient_bits: np.ndarray, scale: float, out: np.ndarray | None = None
) -> np.ndarray:
    """``scale * dy`` where the forward set the element's bit, +0 elsewhere: ReLU with either order of dropout."""
    accumulate, factor = _accumulate(dy, scale)
    dx = flat_result(out, dy)
    gradients, target = np.ascontiguousarray(dy).reshape(-1), dx.reshape(-1)
    for chunk in chunks(dy.size):
        bits = gradient_bits[chunk.start // 8 : -(-chunk.stop // 8)]
        passes = np.unpackbits(bits, count=chunk.stop - chunk.start, bitorder="little").astype(bool)
        target[chunk] = kept_values(gradients[chunk].astype(accumulate) * factor, passes)
    return delivered(dx, out)


def _accumulate(x: np.ndarray, scale: float) -> tuple[Array, Array]:
    accumulate = accumulation_dtype(x.dtype).type
    return accumulate, accumulate(scale)
