"""Which positions of a padded batch count, by the lengths of its samples or by a mask."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any
from weakref import ref

import numpy as np

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.core.cuda import place_of_work, placed, refuse_capture, to_host
from gpu_layers.core.valid import WORD, ValidPositions
from gpu_layers.ops.lengths import checked_lengths, host_lengths
from gpu_layers.runtime.backend import backend_for

# By lengths and place, while somebody has them: layers of a network are called with the same lengths.
_in_use: dict[Hashable, ref[ValidPositions]] = {}


@placed
def valid_positions(x: Array, lengths: ArrayLike | None, mask: Array, channels_last: bool) -> ValidPositions | None:
    """Where a padded batch is valid; None without lengths and mask. On a GPU a mask waits for the device.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
    lengths : array_like of int, shape (N, spatial axes), or (N,) for one spatial axis, or None
        Size of each sample, from 0; positions below it are valid.
    mask : array of bool, shape (N, *spatial), or None
        True where valid; on the device of x.

    Raises
    ------
    TypeError
        If the lengths are not integers, or the mask is not boolean or of another array type than x.
    RuntimeError
        While a graph is captured.
    ValueError
        If both are given, for a wrong shape, for lengths of an input without spatial axes, or a length beyond the
        input's size.
    """
    if lengths is None and mask is None:
        return None
    refuse_capture(x, "a padded batch", "its valid positions are counted on the host")
    if lengths is not None and mask is not None:
        raise ValueError("a padded batch has lengths or a mask, not both")
    spatial = x.shape[1:-1] if channels_last else x.shape[2:]
    if mask is not None:
        return _of_mask(_checked(x, mask, spatial), x)
    if not spatial:
        raise ValueError(f"lengths need a spatial axis, got input of shape {list(x.shape)}: use mask=")
    return _of_lengths(host_lengths(lengths), x, spatial)


def part_of(valid: ValidPositions, start: int, stop: int, x: Array) -> ValidPositions:
    """Those of these samples, for a batch on the device of x."""
    if valid.lengths is None:
        return _of_mask(valid.mask[start:stop], x)
    return _of_lengths(valid.lengths[start:stop], x[start:stop], valid.shape[1:])


def _of_lengths(lengths: np.ndarray, x: Array, spatial: tuple[int, ...]) -> ValidPositions:
    backend = backend_for(x)
    key = backend, lengths.tobytes(), lengths.dtype, lengths.shape, len(x), spatial, place_of_work(x)
    found = _in_use.get(key)
    valid = None if found is None else found()
    if valid is None:
        lengths = checked_lengths(lengths, x, True, spatial)
        sizes: list[int] = np.multiply.reduce(lengths, 1).tolist()
        count = sum(sizes)
        first = sizes.index(next(filter(None, sizes))) * math.prod(spatial) if count else 0
        valid = ValidPositions((len(sizes), *spatial), lengths, None, first, count, backend.valid_words)
        _in_use[key] = ref(valid, lambda _: _in_use.pop(key, None))
    return valid


def _of_mask(mask: Array, x: Array) -> ValidPositions:
    pack = backend_for(x).valid_words
    if isinstance(mask, np.ndarray):
        count = int(np.count_nonzero(mask))
        return ValidPositions(mask.shape, None, mask, int(mask.argmax()) if count else 0, count, pack)
    words = pack(mask.shape, None, mask, x)
    bits = to_host(words)
    some = int((bits != 0).argmax())
    lowest = int(bits[some]) & -int(bits[some])
    first = WORD * some + max(lowest.bit_length() - 1, 0)
    return ValidPositions(mask.shape, None, mask, first, int(np.bitwise_count(bits).sum()), pack, words)


def _checked(x: Array, mask: Array, spatial: tuple[int, ...]) -> Any:
    backend_for(x, mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    if mask.shape != (x.shape[0], *spatial):
        raise ValueError(f"mask must have the shape {[x.shape[0], *spatial]}, got {list(mask.shape)}")
    return mask.copy(order="C")
