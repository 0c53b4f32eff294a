"""Dropout as stateless pairs: the mask is drawn again from a few numbers, never stored."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_integer, check_number, check_uint64
from gpu_layers.core.cuda import array_module
from gpu_layers.core.dropout_saved import DropoutSaved
from gpu_layers.core.mask import MOST_DIGITS, DropoutMask, shared_decisions
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_dtype, check_gradient, check_probability, check_residual, described
from gpu_layers.ops.output import claim_elementwise
from gpu_layers.reference.dropout import kept_chunks
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.copying import own_copy

__all__ = [
    "DropoutSaved",
    "alpha_dropout_backward",
    "alpha_dropout_forward",
    "dropout_backward",
    "dropout_forward",
    "dropout_mask",
    "dropout_moments",
]

# Minus the value at which SELU saturates: its scale times its alpha (Klambauer et al., 2017). Dropped elements of
# alpha dropout become -_ALPHA before the affine map that restores mean and variance.
_ALPHA = 1.7580993408473766
_INT64 = np.dtype(np.int64)


def drop_threshold(p: float) -> int:
    """``round(p * 2**32)``: how many of the ``2**32`` words drop an element."""
    return round(p * 2**32)


def dropout_forward(
    x: Array,
    p: float,
    seed: int | None,
    offset: int | None,
    *,
    start: int = 0,
    scale: float | None = None,
    mask_axes: int | None = None,
    shared_axes: Sequence[int] = (),
    sample_ids: Array = None,
    rng_state: Array = None,
    residual: Array = None,
    channels_last: bool = False,
    out: Array = None,
) -> tuple[Array, DropoutSaved]:
    """Drop with probability p, scale what is kept; add a residual, if there is one.

    Decision ``g`` drops when word ``g & 3`` of the Philox4x32-10 block with counter ``(g >> 2, offset)`` and key
    ``seed`` is below ``round(p * 2**32)``. The mask depends on nothing else: it has the same bits for every
    dtype, layout, device and sharding. Element ``g`` (flat C-order index, plus ``start``) has decision ``g``.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64, any shape and layout.
    p : float
        In [0, 1].
    seed, offset : int
        In ``0 .. 2**64 - 1``; None if rng_state is given.
    start : int
        Number of x's first decision, if x is a shard of a larger array.
    scale : float, optional
        Factor of the kept elements; ``1 / (1 - p)`` by default (inverted dropout).
    mask_axes : int, optional
        Number of leading axes that the mask has. Elements that agree in them share a decision, and ``g`` counts these
        decisions. 2 drops whole channels of ``(N, C, *spatial)``, 1 whole samples. All axes by default. It is the same
        as all other axes in ``shared_axes``.
    shared_axes : sequence of int, optional
        Axes along which elements share a decision, counted from the end if negative. ``g`` counts the elements of the
        shape in which these axes have the length 1. 1 for ``(N, T, C)`` gives all steps of time one mask.
    sample_ids : array of int64, shape (x.shape[0],), optional
        Number of each row, in the array library of x. The row's mask then depends on seed, offset, this number and the
        index within the row alone, whatever the other rows and their order. ``start`` counts within the row.
    rng_state : array of uint64, shape (3,), optional
        Seed and offset in the memory of x's device, for CUDA graphs: see :class:`gpu_layers.CudaGraphGenerator`.
    residual : array, optional
        x's shape and dtype: added to the result, which is rounded once. Its gradient is dy. It needs a mask over all
        axes, without sample_ids.
    channels_last : bool
        x is (N, *spatial, C), and its mask that of (N, C, *spatial): the same elements are dropped in either layout.
        mask_axes counts axes of the latter: 1, 2 or all.
    out : array, optional
        Where to write the result; x itself for dropout in place.

    Returns
    -------
    y : array
        x's shape and dtype; dropped elements are +0 whatever they were.
    saved : DropoutSaved
        For :func:`dropout_backward`; it holds no array but sample_ids.

    Raises
    ------
    TypeError
        For a wrong array type, dtype or number type.
    ValueError
        For p outside [0, 1], or seed, offset, start, mask_axes, shared_axes or the length of sample_ids out of range;
        for a residual of another shape, or one that is out; or for arguments that exclude each other.
    """
    backend = backend_for(x, optional=(out, sample_ids, rng_state, residual))
    drop_below, factor, run, digits = check_dropout(
        x, p, start, scale, mask_axes, shared_axes, sample_ids is not None, channels_last
    )
    # What writes the result keeps the numbers too; not where it is written to given memory, which might be theirs.
    keeps = sample_ids is not None and out is None and x.size > 0
    mask = call_mask(x, drop_below, seed, offset, start, run, sample_ids, rng_state, digits, copies=not keeps)
    channels_last = bool(channels_last)
    if residual is not None:
        _check_residual(residual, x, run, digits, sample_ids, out)
    if out is not None:
        x = claim_elementwise(out, x)
    if keeps:
        y, kept = backend.sample_dropout(x, mask, factor)
        mask = DropoutMask(drop_below, mask.seed, mask.offset, mask.start, run, kept, rng_state)
    else:
        y = backend.dropout_forward(x, mask, factor, out=out, residual=residual, channels_last=channels_last)
    return y, DropoutSaved(mask, factor, x.shape, x.dtype, channels_last)


@Checked
def check_dropout(
    x: Array,
    p: float,
    start: int,
    scale: float | None = None,
    mask_axes: int | None = None,
    shared_axes: Sequence[int] = (),
    by_samples: bool = False,
    channels_last: bool = False,
) -> tuple[int, float, int, tuple[tuple[int, int], ...]]:
    """Threshold, factor, and run and digits of the mask."""
    check_dtype(x)
    probability = check_probability(p)
    axes = check_shared_axes(shared_axes, x.ndim)
    if channels_last:
        _check_channels_last(x, mask_axes, axes, by_samples)
    if mask_axes is not None:
        if axes:
            raise ValueError("mask_axes and shared_axes say the same thing: pass one of them")
        axes = tuple(range(check_integer(mask_axes, "mask_axes", 1, x.ndim), x.ndim))
    if by_samples and axes:
        raise ValueError("sample_ids need a mask over all axes: omit mask_axes and shared_axes")
    shape = _first_channels(x.shape) if channels_last else x.shape
    run, digits, decisions = shared_decisions(shape[1:] if by_samples else shape, axes)
    # The last one is not divided by.
    if len(digits) > MOST_DIGITS + 1:
        raise ValueError(f"shared_axes alternate with other axes too often: got {list(axes)} of {x.ndim} axes")
    check_integer(start, "start", 0, 2**64 - decisions)
    factor = inverted_scale(probability) if scale is None else check_number(scale, "scale")
    return drop_threshold(probability), factor, run, digits


def _check_channels_last(x: Array, mask_axes: int | None, shared_axes: tuple[int, ...], by_samples: bool) -> None:
    if x.ndim < 2:
        raise ValueError(f"channels_last takes x of at least 2 axes, (N, *spatial, C), got {x.ndim}")
    if by_samples or shared_axes:
        raise ValueError("sample_ids and shared_axes do not go with channels_last")
    if mask_axes not in (None, 1, 2, x.ndim):
        raise ValueError(f"with channels_last mask_axes must be 1 (samples), 2 (channels) or None, got {mask_axes}")


def _first_channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1])


def _check_residual(
    residual: Array, x: Array, run: int, digits: tuple[tuple[int, int], ...], sample_ids: Array, out: Array
) -> None:
    check_residual(residual, x)
    if run > 1 or digits or sample_ids is not None:
        raise ValueError("a residual needs a mask over all axes, without sample_ids")
    if out is not None and out is not residual and array_module(x).may_share_memory(out, residual):
        raise ValueError("out must be the residual itself or not overlap it")


def check_shared_axes(shared_axes: object, rank: int | None = None) -> tuple[int, ...]:
    """Different axes of an array of this rank, counted from 0; without a rank they are returned as they are.

    Raises
    ------
    TypeError
        If they are not a sequence of integers.
    ValueError
        If an axis does not exist or comes twice.
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


def dropout_backward(dy: Array, saved: DropoutSaved, *, out: Array = None) -> Array:
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
        Shape and dtype of x.

    Raises
    ------
    TypeError
        If dy has another array type or dtype than y.
    ValueError
        If dy has another shape than y, or out cannot take the result.
    RuntimeError
        If a later call has overwritten the numbers of a :class:`gpu_layers.CudaGraphGenerator`.
    """
    backend = backend_for(dy, optional=(out, saved.mask.sample_ids, saved.mask.rng_state))
    check_gradient(dy, saved.shape, saved.dtype)
    saved.check_unwritten()
    if out is not None:
        dy = claim_elementwise(out, dy)
    return backend.dropout_backward(dy, saved.mask, saved.scale, out=out, channels_last=saved.channels_last)


def dropout_moments(
    x: Array,
    p: float,
    seed: int,
    offset: int,
    *,
    passes: int,
    start: int = 0,
    scale: float | None = None,
    sample_ids: Array = None,
) -> tuple[Array, Array]:
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
        As :func:`dropout_forward`, and for passes that are not an integer in that range.
    """
    backend = backend_for(x, optional=(sample_ids,))
    drop_below, factor, run, _ = check_dropout(x, p, start, scale, None, (), sample_ids is not None)
    mask = call_mask(x, drop_below, seed, offset, start, run, sample_ids, None, copies=False)
    return backend.dropout_moments(x, mask, factor, check_passes(passes))


def check_passes(passes: object) -> int:
    """A number of passes, from 1 to ``2**24``."""
    return check_integer(passes, "passes", 1, 2**24)


def alpha_dropout_forward(
    x: Array,
    p: float,
    seed: int | None,
    offset: int | None,
    *,
    start: int = 0,
    mask_axes: int | None = None,
    shared_axes: Sequence[int] = (),
    rng_state: Array = None,
    channels_last: bool = False,
    out: Array = None,
) -> tuple[Array, DropoutSaved]:
    """Dropout for SELU networks (Klambauer et al., 2017): it keeps mean 0 and variance 1.

    ``y = a * (x if kept else -alpha) + alpha * a * p`` with ``alpha = 1.7580993408473766`` and
    ``a = 1 / sqrt((1 - p) * (1 + p * alpha**2))``; for ``p = 1`` zeros, as in PyTorch.

    Parameters
    ----------
    x, p, seed, offset, start, mask_axes, shared_axes, rng_state, channels_last, out
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
    backend = backend_for(x, optional=(out, rng_state))
    drop_below, numbers, run, digits = _checked_alpha_dropout(x, p, start, mask_axes, shared_axes, channels_last)
    mask = call_mask(x, drop_below, seed, offset, start, run, None, rng_state, digits)
    channels_last = bool(channels_last)
    if out is not None:
        x = claim_elementwise(out, x)
    y = backend.dropout_forward(x, mask, *numbers, out=out, channels_last=channels_last)
    return y, DropoutSaved(mask, numbers[0], x.shape, x.dtype, channels_last)


@Checked
def _checked_alpha_dropout(
    x: Array, p: float, start: int, mask_axes: int | None, shared_axes: Sequence[int], channels_last: bool
) -> tuple[int, tuple[float, float, float], int, tuple[tuple[int, int], ...]]:
    """Threshold, the numbers of the affine map, and run and digits of the mask."""
    drop_below, _, run, digits = check_dropout(x, p, start, None, mask_axes, shared_axes, False, channels_last)
    return drop_below, alpha_map(float(p)), run, digits


def alpha_map(p: float) -> tuple[float, float, float]:
    """Of alpha dropout: scale, shift, and what is written for a dropped element."""
    a = 1 / math.sqrt((1 - p) * (1 + p * _ALPHA**2)) if p < 1 else 0.0
    # Without a shift (p = 0) not +0 but -0 is added, which leaves -0 as it is.
    return a, _ALPHA * a * p or -0.0, -_ALPHA * a * (1 - p) or 0.0


#: The constants of the affine map have no gradient.
alpha_dropout_backward = dropout_backward


def check_sample_ids(sample_ids: Array, x: Array) -> None:
    """Raise unless these are the numbers of x's rows: int64, one an index of axis 0."""
    if sample_ids.dtype != _INT64:
        raise TypeError(f"sample_ids must be int64, got {described(sample_ids.dtype)}")
    if x.ndim == 0 or sample_ids.ndim != 1 or sample_ids.size != len(x):
        if x.ndim == 0:
            raise ValueError(f"sample_ids need an input with rows, got a 0-d input and {list(sample_ids.shape)}")
        raise ValueError(
            f"sample_ids must have the shape [{x.shape[0]}], one number per row, got {list(sample_ids.shape)}"
        )


def dropout_mask(n: int, p: float, seed: int, offset: int, start: int = 0) -> np.ndarray:
    """Which of the elements ``g = start .. start + n - 1`` a dropout call keeps.

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
        True where the element is kept.

    Raises
    ------
    TypeError
        If one of these is not a number of its type.
    ValueError
        For p outside [0, 1], or n, seed, offset or start out of range.
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


def call_mask(
    x: Array,
    drop_below: int,
    seed: int | None,
    offset: int | None,
    start: int,
    run: int,
    sample_ids: Array,
    rng_state: Array,
    digits: tuple[tuple[int, int], ...] = (),
    copies: bool = True,
) -> DropoutMask:
    """The mask of a call; all but its own numbers have been checked."""
    if rng_state is not None or not (
        type(seed) is int and type(offset) is int and 0 <= seed < 2**64 and 0 <= offset < 2**64
    ):
        seed, offset = check_call_numbers(seed, offset, rng_state)
    if sample_ids is not None:
        check_sample_ids(sample_ids, x)
        if copies:  # changing the numbers before backward does not change the mask
            sample_ids = own_copy(sample_ids)
    return DropoutMask(drop_below, seed, offset, operator.index(start), run, sample_ids, rng_state, digits)


def check_call_numbers(seed: object, offset: object, rng_state: Array) -> tuple[int, int]:
    """Seed and offset of a call; zeros, if they lie in rng_state."""
    if rng_state is None:
        return check_uint64(seed, "seed"), check_uint64(offset, "offset")
    _check_rng_state(rng_state, seed, offset)
    return 0, 0


def _check_rng_state(rng_state: Array, seed: object, offset: object) -> None:
    if rng_state.dtype != np.uint64:
        raise TypeError(f"rng_state must be uint64, got {described(rng_state.dtype)}")
    if rng_state.shape != (3,) or not rng_state.flags.c_contiguous:
        raise ValueError(f"rng_state must be three contiguous numbers, got the shape {list(rng_state.shape)}")
    if seed is not None or offset is not None:
        raise ValueError("seed and offset are in rng_state: pass None for both")


def inverted_scale(p: float) -> float:
    """Factor of kept elements, for which the expectation is the input."""
    return 1 / (1 - p) if p < 1 else 0.0
