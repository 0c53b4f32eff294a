"""The order and the batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A shuffle of ``0 .. n - 1`` that depends on seed and epoch alone, so that a resumed run repeats it."""
    # The spawn key separates these streams from that of the initial weights.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,))).permutation(n)


def batch_count(n: int, batch_size: int) -> int:
    """Number of :func:`batches`."""
    return len(list(batches(n, batch_size)))


def batches(n: int, batch_size: int) -> Iterator[slice]:
    """Consecutive slices of ``batch_size`` samples; the last takes what remains.

    A single remaining sample joins the batch before it: one value has no variance for batch norm.
    """
    start = 0
    while start < n:
        stop = min(start + batch_size, n)
        if n - stop == 1:
            stop = n
        yield slice(start, stop)
        start = stop
