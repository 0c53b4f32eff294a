"""A dropout mask as numbers, from which every backend makes the same decisions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gpu_layers.core.array import Array

#: Most digits of a mask beside the last: one more groups of axes may take turns in sharing decisions.
#: ``kMostDigits`` of ``dropout_rule.cuh``.
MOST_DIGITS = 8


class DropoutMask(NamedTuple):
    """Which elements a dropout call keeps.

    Decision ``g`` drops when word ``g & 3`` of the Philox4x32-10 block with counter ``(g >> 2, offset)`` and key
    ``seed`` is below ``drop_below``. Element ``i`` (flat C-order index) has decision ``start + i // run``; with
    ``digits`` not the number ``i // run`` itself is added, but each of its digits times a weight.

    With ``sample_ids`` each row (index of axis 0) has its own decisions: element ``j`` of the row has decision
    ``start + j``, under the key ``sample_seed(seed, number of the row)`` of
    ``gpu_layers.core.philox``.

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
    rng_state : array of uint64, shape (3,), optional
        Seed, offset and the seed of sample 0, on the device of the elements. They replace the numbers above; kernels
        read them when they run.
    digits : tuple of (int, int)
        Size and weight of each digit of ``i // run``, the innermost first; axes that share decisions weigh 0. Empty if
        ``i // run`` itself counts the decisions.
    """

    drop_below: int
    seed: int
    offset: int
    start: int = 0
    run: int = 1
    sample_ids: Array = None
    rng_state: Array = None
    digits: tuple[tuple[int, int], ...] = ()


def shared_decisions(shape: Sequence[int], shared_axes: Sequence[int]) -> tuple[int, tuple[tuple[int, int], ...], int]:
    """Run and digits of the mask of elements that share decisions along axes, and how many decisions there are.

    Decisions count the elements of the shape in which the shared axes have the length 1.

    Parameters
    ----------
    shape : sequence of int
    shared_axes : sequence of int
        In ``0 .. len(shape) - 1``.
    """
    # Neighbouring axes that share, or do not, are as one; the innermost first.
    groups: list[tuple[int, bool]] = []
    for axis in reversed(range(len(shape))):
        size, shared = shape[axis], axis in shared_axes
        if groups and (size == 1 or shared == groups[-1][1]):
            groups[-1] = (groups[-1][0] * size, groups[-1][1])
        elif size != 1:
            groups.append((size, shared))
    decisions = math.prod(size for size, shared in groups if not shared)
    run = groups.pop(0)[0] if groups and groups[0][1] else 1
    if not any(shared for _, shared in groups):
        return max(run, 1), (), decisions
    digits, weight = [], 1
    for size, shared in groups:
        digits.append((size, 0 if shared else weight))
        weight *= 1 if shared else size
    return max(run, 1), tuple(digits), decisions
