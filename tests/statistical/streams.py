"""Random words in the orders in which a mask, and neighbouring masks, use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gpu_layers.core.philox import philox4x32_10, random_words, sample_words

_LOW_32 = np.uint64(0xFFFFFFFF)
CHUNK = 1 << 18


def _blocks(counter_index: int, key_varies: bool, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Block 0 for each of the numbers, in place of the offset or of the seed."""
    counter = np.zeros((4, numbers.size), np.uint32)
    if not key_varies:
        counter[counter_index] = numbers & _LOW_32
        counter[counter_index + 1] = numbers >> np.uint64(32)
        return philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return philox4x32_10(counter, (numbers & _LOW_32, numbers >> np.uint64(32)))


#: Words first .. first + CHUNK - 1 of a stream whose neighbours differ in element, offset, seed or sample.
ORDERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "element": lambda seed, first: random_words(seed, 0, first, CHUNK),
    "offset": lambda seed, first: _blocks(
        2, False, seed, np.arange(CHUNK // 4, dtype=np.uint64) + np.uint64(first // 4)
    ).reshape(-1),
    "seed": lambda seed, first: _blocks(
        0, True, seed, np.arange(CHUNK // 4, dtype=np.uint64) + np.uint64(seed + first // 4)
    ).reshape(-1),
    "sample": lambda seed, first: sample_words(seed, 0, np.arange(CHUNK // 4) + first // 4, 0, 4).reshape(-1),
}


def words(order: str, seed: int, count: int | None = None) -> Iterator[np.ndarray]:
    """The words of an order in chunks of at most ``CHUNK``: count of them, or without an end."""
    first = 0
    while count is None or first < count:
        yield ORDERS[order](seed, first)[: None if count is None else count - first]
        first += CHUNK
