"""Dropout in NumPy: the definition of correct."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.mask import DropoutMask
from gpu_layers.core.philox import random_words, sample_words
from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.results import delivered, flat_result
from gpu_layers.reference.select import chosen_values, kept_values

__all__ = ["advance_rng_state", "dropout_backward", "dropout_forward", "dropout_moments", "sample_dropout"]

# Elements whose random words exist at a time: small enough to stay in a CPU's second-level cache, which
# is what makes this fast, and what bounds the memory beyond the result.
_CHUNK = 1 << 16


@ieee
def dropout_forward(
    x: np.ndarray,
    mask: DropoutMask,
    scale: float,
    shift: float = -0.0,
    dropped: float = 0.0,
    out: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    channels_last: bool = False,
) -> np.ndarray:
    """``x * scale + shift`` where the mask keeps, ``dropped`` elsewhere; plus the residual, if there is one.

    Parameters
    ----------
    x : ndarray
        Any floating dtype and layout.
    mask : DropoutMask
    scale, shift, dropped : float
        Rounded to the accumulation dtype (float32, for float64 float64), in which product and sum are rounded once
        each. A shift of -0 changes no bit.
    out : ndarray, optional
        Array to fill; may be ``x`` itself.
    residual : ndarray, optional
        x's shape and dtype; added in the accumulation dtype. With a run of 1.
    channels_last : bool
        x is (N, *spatial, C), and the mask is that of (N, C, *spatial).

    Returns
    -------
    ndarray
        x's shape and dtype. A dropped element is ``dropped`` whatever it was.
    """
    y = flat_result(out, x)
    if channels_last:
        other = None if residual is None else np.moveaxis(residual, -1, 1)
        found = dropout_forward(np.moveaxis(x, -1, 1), mask, scale, shift, dropped, residual=other)
        y[...] = np.moveaxis(found, 1, -1)
        return delivered(y, out)
    others = None if residual is None else np.ascontiguousarray(residual).reshape(-1)
    source, target = np.ascontiguousarray(x).reshape(-1), y.reshape(-1)
    accumulate = accumulation_dtype(x.dtype).type
    factor, summand, constant = accumulate(scale), accumulate(shift), accumulate(dropped)
    shifts = summand != 0 or not np.signbit(summand)
    for chunk, kept in kept_chunks(mask, source.size):
        values = source[chunk].astype(accumulate, copy=False) * factor
        if shifts:
            values += summand
        if constant:
            values = chosen_values(kept, values, np.broadcast_to(constant, values.shape))
        else:
            values = kept_values(values, kept)
        if others is not None:
            values += others[chunk].astype(accumulate)
        target[chunk] = values
    return delivered(y, out)


# Gradients of kept elements are multiplied by the scale, those of dropped ones are 0: the same map, applied to dy.
dropout_backward = dropout_forward


def sample_dropout(x: np.ndarray, mask: DropoutMask, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """:func:`dropout_forward` of a mask with sample ids, and a copy of these."""
    return dropout_forward(x, mask, scale), mask.sample_ids.copy()


@ieee
def dropout_moments(x: np.ndarray, mask: DropoutMask, scale: float, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of ``dropout_forward`` over the calls ``offset .. offset + passes - 1``.

    An element's output takes two values, so that the number of calls that keep it tells both. Where the one that is
    kept is not finite, the mean is that value, and the variance NaN.

    Parameters
    ----------
    x : ndarray
        Any floating dtype and layout.
    mask : DropoutMask
        Of single elements, of the first call; without an rng_state.
    scale : float
    passes : int
        From 1 to ``2**24``.

    Returns
    -------
    mean, variance : ndarray
        C-contiguous, of the accumulation dtype. The variance is that of the population: divided by ``passes``.
    """
    accumulate = accumulation_dtype(x.dtype).type
    mean, variance = np.empty(x.shape, accumulate), np.empty(x.shape, accumulate)
    counts = np.zeros(x.size, np.int32)
    for number in range(passes):
        call = mask._replace(offset=(mask.offset + number) % 2**64)
        for chunk, is_kept in kept_chunks(call, x.size):
            counts[chunk] += is_kept
    source, means, variances = np.ascontiguousarray(x).reshape(-1), mean.reshape(-1), variance.reshape(-1)
    for chunk in chunks(x.size):
        count = counts[chunk]
        # The output, rounded as that of a forward is.
        value = (source[chunk].astype(accumulate) * accumulate(scale)).astype(x.dtype).astype(accumulate)
        part, other = (kept.astype(accumulate) / accumulate(passes) for kept in (count, passes - count))
        means[chunk] = np.where(count == 0, accumulate(0), value * part)
        # value - value is NaN where the output is not finite.
        spread = (value - value) + (value * part) * (value * other)
        variances[chunk] = np.where(count == 0, accumulate(0), spread)
    return mean, variance


def advance_rng_state(rng_state: np.ndarray, taken: np.ndarray) -> None:
    """Copy a generator's numbers (see :class:`DropoutMask`) to ``taken``, and advance its offset."""
    taken[...] = rng_state
    rng_state[1:2] += np.uint64(1)  # an array: wraps around without a warning


def chunks(size: int) -> Iterator[slice]:
    """Pieces of a flat array, of at most 65,536 elements: a multiple of 8."""
    return (slice(first, min(first + _CHUNK, size)) for first in range(0, size, _CHUNK))


def kept_chunks(mask: DropoutMask, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """The mask of so many elements, in pieces of at most some 65,536.

    Yields
    ------
    slice
        Of the flat array.
    ndarray of bool
        True where its elements are kept.
    """
    if mask.rng_state is not None:
        mask = mask._replace(seed=int(mask.rng_state[0]), offset=int(mask.rng_state[1]), rng_state=None)
    # drop_below = 2**32 does not fit a word: it is compared as 64-bit integers, which takes longer.
    drop_below: np.unsignedinteger = (np.uint32 if mask.drop_below < 2**32 else np.uint64)(mask.drop_below)
    if mask.sample_ids is not None:
        for chunk, words in _sample_chunks(mask, size):
            yield chunk, words >= drop_below
        return
    if mask.digits:
        yield from _shared_chunks(mask, size)
        return
    for chunk in chunks(size):
        first, last = chunk.start // mask.run, (chunk.stop - 1) // mask.run
        kept = _kept(mask.seed, mask.offset, mask.start + first, last - first + 1, drop_below)
        if mask.run > 1:
            edges = np.clip(np.arange(first, last + 2) * mask.run, chunk.start, chunk.stop)
            kept = np.repeat(kept, edges[1:] - edges[:-1])
        yield chunk, kept


# A backward asks for what its forward asked for: of small arrays it is still there, in four megabytes at most.
@lru_cache(maxsize=64)
def _kept(seed: int, offset: int, start: int, count: int, drop_below: np.unsignedinteger) -> np.ndarray:
    """Which of these decisions keep; read-only."""
    kept = random_words(seed, offset, start, count) >= drop_below
    kept.flags.writeable = False
    return kept


def _shared_chunks(mask: DropoutMask, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Where decisions are shared along axes between others: all decisions first, then which one each element has."""
    decisions = math.prod(length for length, weight in mask.digits if weight)
    kept = np.empty(decisions, bool)
    for chunk, of_chunk in kept_chunks(mask._replace(run=1, digits=()), decisions):
        kept[chunk] = of_chunk
    for chunk in chunks(size):
        number = np.arange(chunk.start, chunk.stop) // mask.run
        decision = np.zeros_like(number)
        for length, weight in mask.digits:
            number, digit = np.divmod(number, length)
            decision += digit * weight
        yield chunk, kept[decision]


def _sample_chunks(mask: DropoutMask, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    rows = mask.sample_ids.size
    features = size // rows if rows else 0
    if not features:
        return
    rows_at_once = max(1, _CHUNK // features)
    for row in range(0, rows, rows_at_once):
        ids = mask.sample_ids[row : row + rows_at_once]
        for feature in range(0, features, _CHUNK):
            count = min(_CHUNK, features - feature)
            first = row * features + feature
            words = sample_words(mask.seed, mask.offset, ids, mask.start + feature, count)
            yield slice(first, first + words.size), words.reshape(-1)
