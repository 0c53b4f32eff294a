"""Bias, activation, dropout and the sum with a residual as one stateless pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import place_of
from gpu_layers.core.dropout_saved import DropoutAddSaved, DropoutSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.writes import check_unwritten, write_count
from gpu_layers.ops.activation_dropout import check_order
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_activation, check_dtype, check_gradient, check_residual, described
from gpu_layers.ops.dropout import call_mask, check_dropout
from gpu_layers.ops.output import claim, claim_elementwise
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.copying import natural

__all__ = ["DropoutAddSaved", "dropout_add_backward", "dropout_add_forward"]


def dropout_add_forward(
    x: Array,
    residual: Array,
    p: float,
    seed: int | None,
    offset: int | None,
    *,
    bias: Array = None,
    activation: str | None = None,
    order: str = "after",
    start: int = 0,
    shared_axes: Sequence[int] = (),
    sample_ids: Array = None,
    rng_state: Array = None,
    out: Array = None,
) -> tuple[Array, DropoutAddSaved]:
    """``residual + D(phi(x + bias))`` in one kernel, with an activation phi and (inverted) dropout D.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64, any shape and layout.
    residual : array
        x's shape and dtype.
    p, seed, offset, start, shared_axes, sample_ids, rng_state
        As in :func:`dropout_forward`: the mask is the same.
    bias : array, shape (x.shape[-1],), optional
        Along the last axis; of x's dtype, or float32 for half types.
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        phi, as in :func:`activation_dropout_forward`; None is the identity.
    order : {"after", "before"}
        Dropout after the activation, or before it: ``residual + phi(D(x + bias))``.
    out : array, optional
        Where to write y; may be x or the residual.

    Returns
    -------
    y : array
        x's shape and dtype.
    saved : DropoutAddSaved
        For :func:`dropout_add_backward`.

    Raises
    ------
    TypeError
        For a wrong array type, dtype or number type.
    ValueError
        For a wrong shape, an unknown activation or order, p outside [0, 1], or numbers out of range.
    """
    backend = backend_for(x, residual, optional=(bias, sample_ids, rng_state, out))
    phi, order, dtype, (drop_below, scale, run, digits) = _checked(
        (x, residual, bias), activation, order, p, start, shared_axes, sample_ids is not None
    )
    mask = call_mask(x, drop_below, seed, offset, start, run, sample_ids, rng_state, digits)
    wide = bias if bias is None or bias.dtype == dtype else _of_dtype(bias, dtype)
    # Before out is written to: a backward that needs x then notices.
    writes = write_count()
    source = x
    if out is not None:
        source, residual = claim_elementwise(out, x, residual)
    y, bits = backend.dropout_add_forward(source, wide, residual, phi, mask, scale, order == "before", out)
    kept = {"x": x, "bias": wide} if phi not in ("relu", "identity") else {}
    dropout = DropoutSaved(mask, scale, x.shape, x.dtype, False, writes)
    if bias is not None:
        kept["bias_dtype"] = bias.dtype
    return y, DropoutAddSaved(phi, order, dropout, gradient_bits=bits, writes=writes, **kept)


def dropout_add_backward(dy: Array, saved: DropoutAddSaved, *, out: Array = None) -> tuple[Array, Array, Array]:
    """Gradients of :func:`dropout_add_forward`; its mask is drawn again.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : DropoutAddSaved
    out : array, optional
        Where to write dx; must not overlap dy, which is the gradient of the residual, or x.

    Returns
    -------
    dx : array
        x's shape and dtype, as in :func:`activation_dropout_backward`.
    dresidual : array
        dy itself, not a copy.
    dbias : array or None
        Sums of dx over all axes except the last, before dx is rounded, in an order that depends on the shape alone; of
        the bias's dtype. None if there was no bias.

    Raises
    ------
    TypeError
        If dy has another array type or dtype than y.
    ValueError
        If dy has another shape than y, or out cannot take the result.
    RuntimeError
        If the gradient depends on x and this library has written to x since the forward.
    """
    dropout, has_bias = saved.dropout, saved.has_bias
    mask = dropout.mask
    backend = backend_for(dy, optional=(saved.x, saved.gradient_bits, mask.rng_state, mask.sample_ids, out))
    check_gradient(dy, dropout.shape, dropout.dtype)
    # With ReLU's bits nothing else is needed.
    by_bits = not has_bias and saved.gradient_bits is not None
    if not by_bits:
        check_unwritten(saved.writes, x=saved.x, bias=saved.bias)
        dropout.check_unwritten()
    if out is not None:
        claim(out, dy.shape, dy.dtype, dy, saved.x)
    if by_bits:
        return backend.relu_dropout_backward(dy, saved.gradient_bits, dropout.scale, out), dy, None
    if not has_bias and saved.activation == "identity":
        return backend.dropout_backward(dy, mask, dropout.scale, out=out), dy, None
    dx, dbias = backend.dropout_add_backward(dy, saved, out)
    if dbias is not None and dbias.dtype != saved.bias_dtype:
        dbias = _of_dtype(dbias, saved.bias_dtype)
    return dx, dy, dbias


@Checked
def _checked(
    arrays: tuple[Array, Array, Array],
    activation: str | None,
    order: str,
    p: float,
    start: int,
    shared_axes: Sequence[int],
    by_samples: bool,
) -> tuple[str, str, np.dtype, Any]:
    """Names of the activation and the order, dtype of the computation; threshold, factor, run, digits of the mask."""
    x, residual, bias = arrays
    check_dtype(x)
    check_residual(residual, x)
    dtype = accumulation_dtype(x.dtype)
    if bias is not None:
        if bias.dtype not in (x.dtype, dtype):
            wanted = " or ".join(dict.fromkeys((str(x.dtype), str(dtype))))
            raise TypeError(f"bias must be {wanted} for {x.dtype} input, got {described(bias.dtype)}")
        if x.ndim == 0 or bias.shape != x.shape[-1:]:
            wanted = f"the shape {list(x.shape[-1:])}" if x.ndim else "an input with a last axis"
            raise ValueError(f"bias must have {wanted}, got {list(bias.shape)}")
    phi, order = check_activation("identity" if activation is None else activation), check_order(order)
    return phi, order, dtype, check_dropout(x, p, start, None, None, shared_axes, by_samples)


def _of_dtype(array: Array, dtype: np.dtype | None) -> Array:
    with place_of(array), np.errstate(over="ignore"):
        return natural(array).astype(dtype)
