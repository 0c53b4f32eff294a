"""A pass of an operation whose traffic is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.verification.inputs import normal

#: Bytes of what the memory moves at once.
SECTOR = 32


@dataclass(frozen=True)
class TrafficCase:
    """One pass of an operation, with its floor.

    Attributes
    ----------
    op : str
        Operation and pass, e.g. ``dropout forward``.
    dtype : numpy.dtype
    shape : tuple of int
        Of the input: a reference shape with fewer samples and channels.
    layout : str
        ``NCHW``, ``NHWC`` or ``flat``.
    prepare : callable
        Makes the arrays and runs what comes before; gives the pass itself, a function of nothing, and its floor
        in bytes.
    limit : float
        Most bytes that it may move, as a multiple of the floor.
    by_arrays : int
        Bytes that the array library also moves, by the sizes of its arrays.
    torch_saved : int or None
        Of a forward: bytes that PyTorch's keeps alive for its backward, of its input too.
    """

    op: str
    dtype: np.dtype
    shape: tuple[int, ...]
    layout: str
    prepare: Callable[[], tuple[Callable[[], Any], int]]
    limit: float = 1.05
    torch_saved: int | None = None
    by_arrays: int = 0

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.layout} {'x'.join(map(str, self.shape))}"


def in_layout(shape: tuple[int, ...], dtype: Any, layout: str, *what: Any) -> np.ndarray:
    """Normally distributed values of a shape (N, C, *spatial), in the order of memory of a layout."""
    return normal((shape[0], *shape[2:], shape[1]) if layout == "NHWC" else shape, dtype, *what)
