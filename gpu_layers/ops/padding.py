"""Which positions of a padded batch count, by the lengths of its samples or by a mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.core.cuda import array_module, is_capturing, placed
from gpu_layers.core.valid import ValidPositions
from gpu_layers.ops.lengths import checked_lengths
from gpu_layers.runtime.backend import backend_for

_WORD = 32


@placed
def valid_positions(x: Array, lengths: ArrayLike | None, mask: Array, channels_last: bool) -> ValidPositions | None:
    """Where a padded batch is valid; None without lengths and mask. On a GPU this waits for the device.

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
    if is_capturing(x):
        raise RuntimeError("a padded batch cannot be captured: its valid positions are counted on the host")
    if lengths is not None and mask is not None:
        raise ValueError("a padded batch has lengths or a mask, not both")
    spatial = x.shape[1:-1] if channels_last else x.shape[2:]
    return positions_of(_within(x, lengths, spatial) if mask is None else _checked(x, mask, spatial), x)


def positions_of(mask: Array, x: Array) -> ValidPositions:
    """Those of a mask that nobody changes, for a batch on the device of x."""
    xp = array_module(mask)
    words = xp.zeros(-(-mask.size // _WORD) + 1, np.uint32)
    bits = xp.packbits(mask.reshape(-1), bitorder="little")
    words.view(np.uint8)[: bits.size] = bits
    count = int(xp.count_nonzero(mask))
    first = int(mask.argmax()) if count else 0
    return ValidPositions(mask, array_module(x).asarray(words), first, count)


def _within(x: Array, lengths: ArrayLike | None, spatial: tuple[int, ...]) -> np.ndarray:
    if not spatial:
        raise ValueError(f"lengths need a spatial axis, got input of shape {list(x.shape)}: use mask=")
    own = checked_lengths(lengths, x, True, spatial)
    valid = np.ones((x.shape[0], *(1,) * len(spatial)), bool)
    for axis, size in enumerate(spatial):
        before, after = (1,) * axis, (1,) * (len(spatial) - axis - 1)
        places = np.arange(size).reshape(1, *before, size, *after)
        valid = valid & (places < own[:, axis].reshape(-1, *(1,) * len(spatial)))
    return valid


def _checked(x: Array, mask: Array, spatial: tuple[int, ...]) -> Any:
    backend_for(x, mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    if mask.shape != (x.shape[0], *spatial):
        raise ValueError(f"mask must have the shape {[x.shape[0], *spatial]}, got {list(mask.shape)}")
    return mask.copy(order="C")
