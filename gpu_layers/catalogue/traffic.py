"""A pass of an operation whose traffic is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gpu_layers.catalogue.inputs import normal
from gpu_layers.catalogue.operation import FORWARD, Operation, Sizes
from gpu_layers.core.array import Array, DTypeLike

#: Bytes of what the memory moves at once.
SECTOR = 32
#: A pass, ready to run, and its floor in bytes.
Prepared = tuple[Callable[[], object], int]


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
    torch_saved : int or None
        Of a forward: bytes that PyTorch's keeps alive for its backward, of its input too.
    launches : int
        How many kernels the pass starts.
    """

    op: str
    dtype: np.dtype
    shape: tuple[int, ...]
    layout: str
    prepare: Callable[[], Prepared]
    limit: float = 1.05
    torch_saved: int | None = None
    launches: int = 1

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} {self.layout} {'x'.join(map(str, self.shape))}"


def in_layout(shape: tuple[int, ...], dtype: DTypeLike, layout: str, *what: object) -> np.ndarray:
    """Normally distributed values of a shape (N, C, *spatial), in the order of memory of a layout."""
    return normal((shape[0], *shape[2:], shape[1]) if layout == "NHWC" else shape, dtype, *what)


def passes(
    operation: Operation,
    name: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    layout: str = "flat",
    *,
    forward: Callable[..., Any] | None = None,
    floor: Callable[..., int] | None = None,
    limit: float = 1.05,
    torch_saved: int | None = None,
    launches: tuple[int, int] = (1, 1),
    **arrays: Array,
) -> Iterator[TrafficCase]:
    """The forward of an operation and, if it has one, its backward, of the result in place of a gradient.

    Parameters
    ----------
    operation : Operation
    name : str
    dtype, shape, layout, limit, torch_saved, launches
        As in :class:`TrafficCase`; launches of each pass.
    forward : callable, optional
        ``x -> (y, saved)``; the operation's own, of x and ``arrays``, by default.
    floor : callable, optional
        ``(sizes, direction, saved) -> bytes``; the operation's own by default.
    **arrays
        By the operation's names.
    """
    given, last = {"start": 0, **arrays}, layout == "NHWC"
    run = forward or (lambda x: operation.forward({"x": x, **given}, last))
    backward = operation.backward

    def prepare(direction: str) -> Prepared:
        x = in_layout(shape, dtype, layout)
        y, saved = run(x)
        sizes = Sizes(x.size, y.size, x.itemsize, shape, last)
        fewest = operation.floor(sizes, direction) if floor is None else floor(sizes, direction, saved)
        if direction == FORWARD:
            return lambda: run(x), fewest
        assert backward is not None
        return lambda: backward(y, saved), fewest

    for direction, count in zip(operation.passes, launches, strict=False):
        kept = torch_saved if direction == FORWARD else None
        run_it = partial(prepare, direction)
        yield TrafficCase(f"{name} {direction}", dtype, shape, layout, run_it, limit, kept, launches=count)
