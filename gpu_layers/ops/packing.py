"""The valid positions of a padded batch as the rows of a matrix, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.ops.lengths import sample_lengths
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.cuda import array_module, is_capturing, placed


@dataclass(frozen=True)
class Packing:
    """Which positions of a batch are valid.

    Packing and unpacking move each valid value once, by a gather and a scatter of the array library, and 8 bytes of
    indices for each position and axis.

    Attributes
    ----------
    shape : tuple of int
        Shape of the batch.
    channels_last : bool
    positions : tuple of int64 array, one for each axis except the channels'
        In C order.
    """

    shape: tuple[int, ...]
    channels_last: bool
    positions: tuple[Any, ...]

    @property
    def _index(self) -> tuple[Any, ...]:
        return self.positions if self.channels_last else (self.positions[0], slice(None), *self.positions[1:])

    def pack(self, x: Any) -> Any:
        """The valid values, shape (positions, C)."""
        return _as_bits(x)[self._index].view(x.dtype)

    def unpack(self, rows: Any) -> Any:
        """A batch with these values at its valid positions, +0 elsewhere."""
        x = array_module(rows).zeros(self.shape, rows.dtype)
        _as_bits(x)[self._index] = _as_bits(rows)
        return x

    def bounds(self, samples: list[int]) -> list[int]:
        """The row at which each of these samples begins."""
        xp = array_module(self.positions[0])
        return [int(row) for row in xp.searchsorted(self.positions[0], xp.asarray(samples))]


def _as_bits(x: Any) -> Any:
    """The same memory as integers where elements have two bytes: not every array library indexes bfloat16."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


@placed
def packing_of(x: Any, lengths: Any, mask: Any, channels_last: bool) -> Packing | None:
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
    valid = _within(x, lengths, spatial) if mask is None else _checked(x, mask, spatial)
    return Packing(x.shape, channels_last, tuple(array_module(x).nonzero(valid)))


def _within(x: Any, lengths: Any, spatial: tuple[int, ...]) -> Any:
    if not spatial:
        raise ValueError(f"lengths need a spatial axis, got input of shape {list(x.shape)}: use mask=")
    own, xp = sample_lengths(lengths, x, True, spatial), array_module(x)
    valid = xp.ones((x.shape[0], *(1,) * len(spatial)), bool)
    for axis, size in enumerate(spatial):
        before, after = (1,) * axis, (1,) * (len(spatial) - axis - 1)
        places = xp.arange(size).reshape(1, *before, size, *after)
        valid = valid & (places < own[:, axis].reshape(-1, *(1,) * len(spatial)))
    return valid


def _checked(x: Any, mask: Any, spatial: tuple[int, ...]) -> Any:
    backend_for(x, mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    if mask.shape != (x.shape[0], *spatial):
        raise ValueError(f"mask must have the shape {[x.shape[0], *spatial]}, got {list(mask.shape)}")
    return mask
