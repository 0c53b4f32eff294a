"""A dropout mask as numbers, from which every backend makes the same decisions."""

from __future__ import annotations

from typing import Any, NamedTuple


class DropoutMask(NamedTuple):
    """Which elements a dropout call keeps.

    Decision ``g`` drops when word ``g & 3`` of the Philox4x32-10 block with counter ``(g >> 2, offset)`` and key
    ``seed`` is below ``drop_below``. Element ``i`` (flat C-order index) has decision ``start + i // run``.

    With ``sample_ids`` each row (index of axis 0) has its own decisions: element ``j`` of the row has decision
    ``start + j``, under the key ``sample_seed(seed, number of the row)`` of
    ``gpu_layers.reference.philox``.

    Attributes
    ----------
    drop_below : int
        ``round(p * 2**32)``, in ``0 .. 2**32``.
    seed, offset : int
        Key, and number of the call.
    start : int
        Number of the first decision in the whole (sharded) array.
    run : int
        Number of neighbouring elements that share a decision: 1, or those of a channel or a sample.
    sample_ids : array of int64, optional
        Number of each row, on the device of the elements; only with a run of 1.
    draw : array of uint64, shape (3,), optional
        Seed, offset and the seed of sample 0, on the device of the elements. They replace the numbers above; kernels
        read them when they run.
    """

    drop_below: int
    seed: int
    offset: int
    start: int = 0
    run: int = 1
    sample_ids: Any = None
    draw: Any = None
