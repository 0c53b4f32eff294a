"""Statistics of random words, each in units of the deviation that independent words would have.

Five deviations are exceeded by chance once in 1.7 million.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gpu_layers.core.philox import random_words
from gpu_layers.ops.dropout import drop_threshold
from tests.statistical.streams import CHUNK

LAGS = (1, 2, 3, 4, 5, 8, 16, 4096)


def dropped(chunks: Iterable[np.ndarray], p: float) -> tuple[int, int, float]:
    """How many words drop, of how many, and how far that is from ``T / 2**32`` of them."""
    threshold = np.uint32(drop_threshold(p))
    found = total = 0
    for chunk in chunks:
        found += int(np.count_nonzero(chunk < threshold))
        total += chunk.size
    exact = float(threshold) / 2**32
    return found, total, (found - total * exact) / np.sqrt(total * exact * (1 - exact))


def frequencies(chunks: Iterable[np.ndarray]) -> dict[str, float]:
    """Dropped fractions for several p; both halves of the words, and pairs of bytes of neighbours, in 65,536 cells."""
    exact = {p: drop_threshold(p) / 2**32 for p in (0.001, 0.1, 0.3, 0.5, 0.9)}
    found = dict.fromkeys(exact, 0)
    cells = {name: np.zeros(65536) for name in ("low halves", "high halves", "pairs of bytes")}
    total = 0
    for chunk in chunks:
        for p in exact:
            found[p] += int(np.count_nonzero(chunk < np.uint32(drop_threshold(p))))
        halves = chunk.view(np.uint16).reshape(-1, 2)
        high_bytes = (chunk >> np.uint32(24)).astype(np.intp)
        values = (halves[:, 0], halves[:, 1], high_bytes[0::2] << 8 | high_bytes[1::2])
        for counts, numbers in zip(cells.values(), values, strict=True):
            counts += np.bincount(numbers, minlength=65536)
        total += chunk.size
    return {
        **{f"p = {p}": float((found[p] - total * e) / np.sqrt(total * e * (1 - e))) for p, e in exact.items()},
        **{name: _deviations_of_chi_squared(counts) for name, counts in cells.items()},
    }


def _deviations_of_chi_squared(counts: np.ndarray) -> float:
    """How many deviations chi squared is from its expectation, of cells that are equally likely."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom))


def neighbours(chunks: Iterable[np.ndarray]) -> dict[str, float]:
    """How often two decisions at a distance both drop."""
    together = {(p, lag): 0 for p in (0.1, 0.5) for lag in LAGS}
    pairs = dict.fromkeys(LAGS, 0)
    for chunk in chunks:
        dropping = {p: chunk < np.uint32(drop_threshold(p)) for p in (0.1, 0.5)}
        for p, lag in together:
            together[p, lag] += int(np.count_nonzero(dropping[p][lag:] & dropping[p][:-lag]))
        for lag in LAGS:
            pairs[lag] += max(chunk.size - lag, 0)
    # Of n overlapping pairs the variance is n (p**2 - p**4 + 2 (p**3 - p**4)): neighbours share an element.
    return {
        f"p = {p}, distance {lag}": float(
            (found - pairs[lag] * p**2) / np.sqrt(pairs[lag] * (p**2 - p**4 + 2 * (p**3 - p**4)))
        )
        for (p, lag), found in together.items()
    }


def one_bit_apart(which: str, bit: int, seed: int, count: int) -> float:
    """Of two streams whose seeds, or offsets, differ in a bit: whether half of the bits of so many words agree."""
    agreeing = total = 0
    for first in range(0, count, CHUNK):
        one = random_words(seed, 7, first, CHUNK)
        other = (
            random_words(seed ^ bit, 7, first, CHUNK) if which == "seed" else random_words(seed, 7 ^ bit, first, CHUNK)
        )
        agreeing += 32 * CHUNK - int(np.bitwise_count(one ^ other).sum())
        total += 32 * CHUNK
    return (agreeing - total / 2) / (np.sqrt(total) / 2)
