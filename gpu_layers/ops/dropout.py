"""Dropout as stateless pairs: the mask is regenerated from a few numbers, never stored."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpu_layers.mask import MOST_DIGITS, DropoutMask, shared_decisions
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import (
    check_dtype,
    check_gradient,
    check_integer,
    check_number,
    check_probability,
    check_uint64,
    described,
)
from gpu_layers.ops.elementwise_output import into
from gpu_layers.reference.dropout import kept_chunks
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.cuda import place_of
from gpu_layers.runtime.writes import check_unwritten, write_count

# Minus the value that SELU saturates at: its scale times its alpha (Klambauer et al., 2017). Dropped elements of
# alpha dropout become -_ALPHA before the affine map that restores mean and variance.
_ALPHA = 1.7580993408473766


@dataclass(slots=True)
class DropoutSaved:
    """What backward needs: numbers only (and the numbers of the samples, where these were given).

    Attributes
    ----------
    mask : DropoutMask
        Which elements are kept.
    scale : float
        Factor of a kept element.
    shape : tuple of int
    dtype : numpy.dtype
    writes : int
        :func:`write_count` of the forward: the numbers may lie in an array that a later call takes too.
    """

    mask: DropoutMask
    scale: float
    shape: tuple[int, ...]
    dtype: np.dtype
    writes: int = field(default_factory=write_count)

    def with_draw(self, draw: Any) -> DropoutSaved:
        """The same, of the call whose numbers lie in ``draw``."""
        return replace(self, mask=self.mask._replace(draw=draw), writes=write_count())

    def check_unwritten(self) -> None:
        """RuntimeError if a later call has put its numbers where this one's were."""
        check_unwritten(self.writes, draw=self.mask.draw)


def drop_threshold(p: float) -> int:
    """``round(p * 2**32)``: the number of 32-bit words, of ``2**32``, that drop an element."""
    return round(p * 2**32)


def dropout_forward(
    x: Any,
    p: float,
    seed: int | None,
    offset: int | None,
    *,
    start: int = 0,
    scale: float | None = None,
    mask_axes: int | None = None,
    shared_axes: Sequence[int] = (),
    sample_ids: Any = None,
    draw: Any = None,
    out: Any = None,
) -> tuple[Any, DropoutSaved]:
    """Drop with probability p, scale what is kept.

    Decision ``g`` drops when word ``g & 3`` of the Philox4x32-10 block with counter ``(g >> 2, offset)`` and key
    ``seed`` is below ``round(p * 2**32)``. Nothing else enters: the mask is the same bits for every dtype, layout,
    device and sharding. Element ``g`` (flat C-order index, plus ``start``) has decision ``g``.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64, any shape and layout.
    p : float
        In [0, 1].
    seed, offset : int
        In ``0 .. 2**64 - 1``; None if draw is given.
    start : int
        Number of x's first decision in the whole array, where x is a shard of one.
    scale : float, optional
        Factor of the kept elements; ``1 / (1 - p)`` by default (inverted dropout).
    mask_axes : int, optional
        Leading axes that the mask has: elements that agree in them share a decision, and ``g`` counts these. 2 drops
        whole channels of ``(N, C, *spatial)``, 1 whole samples. All axes by default. The same as all others in
        ``shared_axes``.
    shared_axes : sequence of int, optional
        Axes along which elements share a decision, from the end if negative: ``g`` counts the elements of the shape in
        which these have the length 1. 1 of ``(N, T, C)`` gives all steps of time one mask.
    sample_ids : array of int64, shape (x.shape[0],), optional
        Number of each row, where x is (NumPy or CuPy). The row's mask then depends on seed, offset, this number and the
        index within the row alone (``start`` counts within the row): whatever other rows there are, in whatever order.
    draw : array of uint64, shape (3,), optional
        Seed and offset in memory where x is, for CUDA graphs: see :class:`gpu_layers.CudaGraphGenerator`.
    out : array, optional
        Where to write the result; x itself for dropout in place.

    Returns
    -------
    y : array
        x's shape and dtype; dropped elements are +0 whatever they were.
    saved : DropoutSaved
        For :func:`dropout_backward`; holds no array but sample_ids.

    Raises
    ------
    TypeError
        For an array, dtype or number of the wrong type.
    ValueError
        For p outside [0, 1], or seed, offset, start, mask_axes, shared_axes or the length of sample_ids out of range.
    """
    backend = backend_for(x, optional=(out, sample_ids, draw))
    drop_below, factor, run, digits = _checked_dropout(
        x, p, start, scale, mask_axes, shared_axes, sample_ids is not None
    )
    mask = _mask(x, drop_below, seed, offset, start, run, sample_ids, draw, digits)
    if out is None:
        y = backend.dropout_forward(x, mask, factor)
    else:
        y = into(out, x, lambda target: backend.dropout_forward(x, mask, factor, out=target))
    return y, DropoutSaved(mask, factor, x.shape, x.dtype)


@Checked
def _checked_dropout(
    x: Any,
    p: float,
    start: int,
    scale: float | None,
    mask_axes: int | None,
    shared_axes: Sequence[int],
    by_samples: bool,
) -> tuple[int, float, int, tuple[tuple[int, int], ...]]:
    """Threshold, factor, and run and digits of the mask."""
    check_dtype(x)
    probability = check_probability(p)
    axes = check_shared_axes(shared_axes, x.ndim)
    if mask_axes is not None:
        if axes:
            raise ValueError("mask_axes and shared_axes say the same thing: pass one of them")
        axes = tuple(range(check_integer(mask_axes, "mask_axes", 1, x.ndim), x.ndim))
    if by_samples and axes:
        raise ValueError("sample_ids go with a mask over all axes: leave mask_axes and shared_axes away")
    run, digits, decisions = shared_decisions(x.shape[1:] if by_samples else x.shape, axes)
    # The last one is not divided by.
    if len(digits) > MOST_DIGITS + 1:
        raise ValueError(f"shared_axes take turns with others too often: got {list(axes)} of {x.ndim} axes")
    check_integer(start, "start", 0, 2**64 - decisions)
    factor = inverted_scale(probability) if scale is None else check_number(scale, "scale")
    return drop_threshold(probability), factor, run, digits


def check_shared_axes(shared_axes: Any, rank: int | None = None) -> tuple[int, ...]:
    """Different axes of an array of this rank, from 0 on, or of one that is not known yet, as they are.

    Raises
    ------
    TypeError
        If they are no sequence of integers.
    ValueError
        If there is no such axis, or one comes twice.
    """
    if isinstance(shared_axes, str) or not isinstance(shared_axes, Sequence):
        raise TypeError(f"shared_axes must be a sequence of integers, got {type(shared_axes).__name__}")
    most = 64 if rank is None else rank
    axes = tuple(check_integer(axis, "shared_axes", -most, most - 1) for axis in shared_axes)
    if rank is not None:
        axes = tuple(axis % rank for axis in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"shared_axes must be different axes, got {list(shared_axes)}")
    return axes


def dropout_backward(dy: Any, saved: DropoutSaved, *, out: Any = None) -> Any:
    """Gradient of :func:`dropout_forward` and :func:`alpha_dropout_forward`: the same mask and scale, applied to dy.

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
    backend = backend_for(dy, optional=(out, saved.mask.sample_ids, saved.mask.draw))
    check_gradient(dy, saved.shape, saved.dtype)
    saved.check_unwritten()
    if out is None:
        return backend.dropout_backward(dy, saved.mask, saved.scale)
    return into(out, dy, lambda target: backend.dropout_backward(dy, saved.mask, saved.scale, out=target))


def dropout_moments(
    x: Any,
    p: float,
    seed: int,
    offset: int,
    *,
    passes: int,
    start: int = 0,
    scale: float | None = None,
    sample_ids: Any = None,
) -> tuple[Any, Any]:
    """Mean and variance of :func:`dropout_forward` over ``passes`` calls, in one kernel.

    Parameters
    ----------
    x, p, seed, start, scale, sample_ids
        As in :func:`dropout_forward`.
    offset : int
        Number of the first call; the others are those after it (mod ``2**64``).
    passes : int
        From 1 to ``2**24``.

    Returns
    -------
    mean, variance : array
        x's shape; float64 for float64, float32 for all others. The variance is divided by ``passes``.

    Raises
    ------
    TypeError, ValueError
        As :func:`dropout_forward`, and for passes that are no such number.
    """
    backend = backend_for(x, optional=(sample_ids,))
    drop_below, factor, run, _ = _checked_dropout(x, p, start, scale, None, (), sample_ids is not None)
    mask = _mask(x, drop_below, seed, offset, start, run, sample_ids, None)
    return backend.dropout_moments(x, mask, factor, check_passes(passes))


def check_passes(passes: Any) -> int:
    """A number of passes, from 1 to ``2**24``."""
    return check_integer(passes, "passes", 1, 2**24)


def alpha_dropout_forward(
    x: Any,
    p: float,
    seed: int | None,
    offset: int | None,
    *,
    start: int = 0,
    mask_axes: int | None = None,
    shared_axes: Sequence[int] = (),
    draw: Any = None,
    out: Any = None,
) -> tuple[Any, DropoutSaved]:
    """Dropout for SELU networks (Klambauer et al., 2017): mean 0 and variance 1 stay as they are.

    ``y = a * (x if kept else -alpha) + alpha * a * p`` with ``alpha = 1.7580993408473766`` and
    ``a = 1 / sqrt((1 - p) * (1 + p * alpha**2))``; for ``p = 1`` zeros, as in PyTorch.

    Parameters
    ----------
    x, p, seed, offset, start, mask_axes, shared_axes, draw, out
        As in :func:`dropout_forward`.

    Returns
    -------
    y : array
        x's shape and dtype; a dropped element is ``-alpha * a * (1 - p)`` whatever it was.
    saved : DropoutSaved
        For :func:`alpha_dropout_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`dropout_forward`.
    """
    backend = backend_for(x, optional=(out, draw))
    drop_below, numbers, run, digits = _checked_alpha_dropout(x, p, start, mask_axes, shared_axes)
    mask = _mask(x, drop_below, seed, offset, start, run, None, draw, digits)
    if out is None:
        y = backend.dropout_forward(x, mask, *numbers)
    else:
        y = into(out, x, lambda target: backend.dropout_forward(x, mask, *numbers, out=target))
    return y, DropoutSaved(mask, numbers[0], x.shape, x.dtype)


@Checked
def _checked_alpha_dropout(
    x: Any, p: float, start: int, mask_axes: int | None, shared_axes: Sequence[int]
) -> tuple[int, tuple[float, float, float], int, tuple[tuple[int, int], ...]]:
    """Threshold, the numbers of the affine map, and run and digits of the mask."""
    drop_below, _, run, digits = _checked_dropout(x, p, start, None, mask_axes, shared_axes, False)
    p = float(p)
    a = 1 / math.sqrt((1 - p) * (1 + p * _ALPHA**2)) if p < 1 else 0.0
    # Without a shift (p = 0) not +0 but -0 is added, which leaves -0 as it is.
    return drop_below, (a, _ALPHA * a * p or -0.0, -_ALPHA * a * (1 - p) or 0.0), run, digits


#: The constants of the affine map have no gradient.
alpha_dropout_backward = dropout_backward


def check_sample_ids(sample_ids: Any, x: Any) -> None:
    """Raise unless these are the numbers of x's rows: int64, one an index of axis 0, where x is."""
    backend_for(x, sample_ids)
    if sample_ids.dtype != np.int64:
        raise TypeError(f"sample_ids must be int64, got {described(sample_ids.dtype)}")
    if x.ndim == 0 or sample_ids.shape != x.shape[:1]:
        needed = f"[{x.shape[0]}], one number a row" if x.ndim else "a row each, which a 0-d input has none of"
        raise ValueError(f"sample_ids must have the shape {needed}, got {list(sample_ids.shape)}")


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
    mask = DropoutMask(
        drop_threshold(check_probability(p)),
        check_uint64(seed, "seed"),
        check_uint64(offset, "offset"),
        check_integer(start, "start", 0, 2**64 - n),
    )
    keep = np.empty(n, dtype=bool)
    for chunk, kept in kept_chunks(mask, n):
        keep[chunk] = kept
    return keep


def _mask(
    x: Any,
    drop_below: int,
    seed: int | None,
    offset: int | None,
    start: int,
    run: int,
    sample_ids: Any,
    draw: Any,
    digits: tuple[tuple[int, int], ...] = (),
) -> DropoutMask:
    """The mask of a call; all but its own numbers have been checked."""
    if draw is not None or not (
        type(seed) is int and type(offset) is int and 0 <= seed < 2**64 and 0 <= offset < 2**64
    ):
        seed, offset = check_call_numbers(seed, offset, draw)
    if sample_ids is not None:
        check_sample_ids(sample_ids, x)
        # A copy: who changes the numbers before backward does not change the mask.
        with place_of(x):
            sample_ids = sample_ids.copy()
    return DropoutMask(drop_below, seed, offset, operator.index(start), run, sample_ids, draw, digits)


def check_call_numbers(seed: Any, offset: Any, draw: Any) -> tuple[int, int]:
    """Seed and offset of a call; zeros, if they lie in draw."""
    if draw is None:
        return check_uint64(seed, "seed"), check_uint64(offset, "offset")
    _check_draw(draw, seed, offset)
    return 0, 0


def _check_draw(draw: Any, seed: Any, offset: Any) -> None:
    if draw.dtype != np.uint64:
        raise TypeError(f"draw must be uint64, got {described(draw.dtype)}")
    if draw.shape != (3,) or not draw.flags.c_contiguous:
        raise ValueError(f"draw must be three contiguous numbers, got the shape {list(draw.shape)}")
    if seed is not None or offset is not None:
        raise ValueError("seed and offset are in draw: pass None for both")


def element_mask(
    x: Any,
    p: float,
    seed: int | None,
    offset: int | None,
    start: int = 0,
    draw: Any = None,
    shared_axes: Sequence[int] = (),
    sample_ids: Any = None,
) -> tuple[DropoutMask, float]:
    """The mask over elements of x, checked, and the factor of what is kept."""
    drop_below, factor, run, digits = _checked_dropout(x, p, start, None, None, shared_axes, sample_ids is not None)
    return _mask(x, drop_below, seed, offset, start, run, sample_ids, draw, digits), factor


def inverted_scale(p: float) -> float:
    """Factor of what is kept, by which the expectation stays the input."""
    return 1 / (1 - p) if p < 1 else 0.0
