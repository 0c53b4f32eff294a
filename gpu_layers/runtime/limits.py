"""Limits of launches. Tests lower them, so that small arrays take the paths of large ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, eq=False)
class Limits:
    """The limits of a launch. Each call looks its program up by these: equal ones are one object.

    Attributes
    ----------
    max_blocks : int
        Most blocks of a grid; kernels with more work walk over it in steps of the grid.
    index32_below : int
        Arrays with at least this many vectors in an image are indexed with 64 bits.
    full_grid : int
        A thread takes more than its least work only if this many blocks remain.
    one_read : bool
        Whether batch norm may keep what it reads, so that it reads it once.
    """

    # A step of the grid beyond this many blocks costs nothing measurable, and leaves room below the 2**31 - 1
    # blocks that a grid may have.
    max_blocks: int = 2**30
    # Below 2**31 by more than the threads of a block: an index may be that far beyond the end of an image.
    index32_below: int = 2**31 - 1024
    # About as many blocks of 256 threads as the GPU that plans are made for holds at once.
    full_grid: int = 1024
    one_read: bool = True


#: Those of a GPU, whatever is in force: for a choice between kernels that add in different orders.
OF_A_GPU = Limits()

_limits: ContextVar[Limits] = ContextVar("gpu_layers_limits", default=OF_A_GPU)


#: The limits in force.
limits = _limits.get


@cache
def _lowered(max_blocks: int, index32_below: int, full_grid: int, one_read: bool) -> Limits:
    return Limits(max_blocks, index32_below, full_grid, one_read)


@contextmanager
def force_limits(
    *, max_blocks: int | None = None, index64: bool = False, full_grid: int | None = None, two_reads: bool = False
) -> Iterator[None]:
    """Lower the limits in a ``with`` block: the same results, by the code for large arrays.

    Parameters
    ----------
    max_blocks : int, optional
        Most blocks of a grid.
    index64 : bool
        Index with 64 bits, whatever the size.
    full_grid : int, optional
        Number of blocks that must remain before a thread takes more than its least work.
    two_reads : bool
        Read everything twice, as batch norm does if a GPU cannot keep what it reads.
    """
    current = limits()
    token = _limits.set(
        _lowered(
            current.max_blocks if max_blocks is None else max_blocks,
            0 if index64 else current.index32_below,
            current.full_grid if full_grid is None else full_grid,
            current.one_read and not two_reads,
        )
    )
    try:
        yield
    finally:
        _limits.reset(token)
