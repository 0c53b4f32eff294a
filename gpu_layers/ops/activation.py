"""Activations as stateless pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.ops.checks import check_dtype, check_gradient
from gpu_layers.ops.output import claim_elementwise
from gpu_layers.runtime.backend import backend_for

__all__ = ["ReluSaved", "relu_backward", "relu_forward"]


@dataclass(slots=True)
class ReluSaved:
    """What backward needs. It shares no memory with the caller's arrays: the output may be overwritten.

    Attributes
    ----------
    gradient_bits : array of uint8
        One bit per element: whether the input was positive, or NaN. That moves fewer bytes than reading the output
        again.
    shape : tuple of int
    dtype : numpy.dtype
    """

    gradient_bits: Array
    shape: tuple[int, ...]
    dtype: np.dtype


def relu_forward(x: Array, *, out: Array = None) -> tuple[Array, ReluSaved]:
    """``max(x, 0)``; NaN stays NaN.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64.
    out : array, optional
        Where to write the result; may be x.

    Returns
    -------
    y : array
        Shape and dtype of x.
    saved : ReluSaved
        For :func:`relu_backward`.

    Raises
    ------
    TypeError, ValueError
        For a wrong array type or dtype, or an out that cannot take the result.
    """
    backend = backend_for(x, optional=(out,))
    check_dtype(x)
    if out is not None:
        x = claim_elementwise(out, x)
    y, bits = backend.relu_forward(x, out)
    return y, ReluSaved(bits, x.shape, x.dtype)


def relu_backward(dy: Array, saved: ReluSaved, *, out: Array = None) -> Array:
    """Gradient of :func:`relu_forward`: ``dy`` where the input was positive (or NaN), 0 elsewhere, as in PyTorch.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : ReluSaved
    out : array, optional
        Where to write the result; may be dy.

    Returns
    -------
    array
        Shape and dtype of x.

    Raises
    ------
    TypeError
        If dy has another array type or dtype than y.
    ValueError
        If dy has another shape than y, or out cannot take the result.
    """
    backend = backend_for(dy, saved.gradient_bits, optional=(out,))
    check_gradient(dy, saved.shape, saved.dtype)
    if out is not None:
        dy = claim_elementwise(out, dy)
    return backend.relu_backward(dy, saved.gradient_bits, out)
