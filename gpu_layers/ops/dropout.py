"""Dropout as a stateless pair: the mask is regenerated from three numbers, never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.ops.checks import (
    check_dtype,
    check_gradient,
    check_integer,
    check_number,
    check_probability,
    check_uint64,
)
from gpu_layers.ops.elementwise_output import into
from gpu_layers.reference.dropout import dropout_mask as _reference_mask
from gpu_layers.runtime.backend import backend_for


@dataclass(frozen=True)
class DropoutSaved:
    """What backward needs: numbers only.

    Attributes
    ----------
    drop_below : int
        ``round(p * 2**32)``: an element is dropped when its random word is below.
    scale : float
        Factor of a kept element.
    seed, offset, start : int
        Key, number of the call, first element's index in the whole (sharded) array.
    shape : tuple of int
    dtype : numpy.dtype
    """

    drop_below: int
    scale: float
    seed: int
    offset: int
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype


def drop_threshold(p: float) -> int:
    """``round(p * 2**32)``: the number of 32-bit words, of ``2**32``, that drop an element."""
    return round(p * 2**32)


def dropout_forward(
    x: Any,
    p: float,
    seed: int,
    offset: int,
    *,
    start: int = 0,
    scale: float | None = None,
    out: Any = None,
) -> tuple[Any, DropoutSaved]:
    """Drop each element with probability p, scale the others.

    Element ``g`` (flat C-order index, plus ``start``) is dropped when word ``g & 3`` of the Philox4x32-10 block with
    counter ``(g >> 2, offset)`` and key ``seed`` is below ``round(p * 2**32)``. Nothing else enters: the mask is the
    same bits for every dtype, layout, device and sharding.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64, any shape and layout.
    p : float
        In [0, 1].
    seed, offset : int
        In ``0 .. 2**64 - 1``.
    start : int
        Index of x's first element in the whole array, where x is a shard of one.
    scale : float, optional
        Factor of the kept elements; ``1 / (1 - p)`` by default (inverted dropout).
    out : array, optional
        Where to write the result; x itself for dropout in place.

    Returns
    -------
    y : array
        x's shape and dtype; dropped elements are +0 whatever they were.
    saved : DropoutSaved
        For :func:`dropout_backward`; holds no array.

    Raises
    ------
    TypeError
        For an array, dtype or number of the wrong type.
    ValueError
        For p outside [0, 1], or seed, offset, start out of range.
    """
    backend = backend_for(x, optional=(out,))
    check_dtype(x)
    p = check_probability(p)
    saved = DropoutSaved(
        drop_below=drop_threshold(p),
        scale=_inverted_scale(p) if scale is None else check_number(scale, "scale"),
        seed=check_uint64(seed, "seed"),
        offset=check_uint64(offset, "offset"),
        start=check_integer(start, "start", 0, 2**64 - x.size),
        shape=x.shape,
        dtype=x.dtype,
    )
    y = into(out, x, lambda target: backend.dropout_forward(x, **_numbers(saved), out=target))
    return y, saved


def dropout_backward(dy: Any, saved: DropoutSaved, *, out: Any = None) -> Any:
    """Gradient of :func:`dropout_forward`: the same mask and scale, applied to dy.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : DropoutSaved
    out : array, optional
        Where to write the result; may be dy.

    Returns
    -------
    array
    """
    backend = backend_for(dy, optional=(out,))
    check_gradient(dy, saved.shape, saved.dtype)
    return into(out, dy, lambda target: backend.dropout_backward(dy, **_numbers(saved), out=target))


def dropout_mask(n: int, p: float, seed: int, offset: int, start: int = 0) -> np.ndarray:
    """Which elements ``g = start .. start + n - 1`` a dropout call keeps.

    Parameters
    ----------
    n : int
    p : float
        In [0, 1].
    seed, offset, start : int
        As in :func:`dropout_forward`.

    Returns
    -------
    numpy.ndarray of bool, shape (n,)
    """
    n = check_integer(n, "n", 0, 2**63 - 1)
    return _reference_mask(
        n,
        drop_threshold(check_probability(p)),
        check_uint64(seed, "seed"),
        check_uint64(offset, "offset"),
        check_integer(start, "start", 0, 2**64 - n),
    )


def _inverted_scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _numbers(saved: DropoutSaved) -> dict[str, Any]:
    names = ("drop_below", "scale", "seed", "offset", "start")
    return {name: getattr(saved, name) for name in names}
