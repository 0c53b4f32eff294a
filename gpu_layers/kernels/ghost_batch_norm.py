"""Launching batch norm's kernels over groups of samples, in place in the whole arrays."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_layers.core.array import Array
from gpu_layers.core.batch_norm_saved import GhostBatchNormSaved
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.kernels import batch_norm
from gpu_layers.kernels.arrays import delivered, destination, empty, ready
from gpu_layers.kernels.batch_norm import add_gradients, merge_parts, of_positions, of_running_statistics, told_counts
from gpu_layers.kernels.batch_norm_common import ROWS, Folding
from gpu_layers.runtime.program import Launcher, Numbers, Operand, Operands

__all__ = ["ghost_batch_norm_backward", "ghost_batch_norm_forward"]

# Numbers of a padded group, and of what comes before them, in a call.
_OF_GROUP, _OF_MERGE = 2, 2


def ghost_batch_norm_forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    bounds: tuple[int, ...],
    channels_last: bool = False,
    residual: Array | None = None,
    activation: str = "identity",
    valid: Sequence[ValidPositions] = (),
    counts: tuple[int, ...] | None = None,
    running: RunningStatistics | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """``gpu_layers.reference.ghost_batch_norm_forward``, as kernels."""
    of_running, folding = of_running_statistics(running)
    numbers: Numbers
    told, numbers = (None, (0, 0)) if counts is None else told_counts(counts, x)
    words = []
    for positions in valid:
        of_group, numbers_of_group = of_positions(positions, x)
        words.append(of_group)
        numbers += numbers_of_group
    operands = (x, gamma, beta, residual, *of_running, told, out, *words)
    arguments = (eps, bounds, channels_last, activation, folding, counts is not None)
    return _forward(operands, arguments, numbers)


def ghost_batch_norm_backward(
    dy: Array, saved: GhostBatchNormSaved, out: Array | None = None
) -> tuple[Array, Array, Array, Array | None]:
    """``gpu_layers.reference.ghost_batch_norm_backward``, as kernels."""
    words = [positions.words(saved.x) for positions in saved.valid]
    operands = (dy, saved.x, saved.statistics, saved.residual, out, *words)
    numbers = tuple([positions.count for positions in saved.valid])
    return _backward(operands, (saved.bounds, saved.channels_last, saved.activation), numbers)


def _groups(operand: Operand | None, bounds: tuple[int, ...]) -> Sequence[Operand | None]:
    """Parts of an array, or as many Nones."""
    return [None] * (len(bounds) - 1) if operand is None else operand.program.split(operand, bounds)


def _statistics(statistics: Operand, channels: int) -> list[Operand]:
    """Those of each group, (5, C)."""
    groups, size = statistics.shape
    offsets = [group * size for group in range(groups)]
    return statistics.program.views(statistics, offsets, [(len(ROWS), channels)] * groups)


@Launcher
def _forward(
    operands: Operands,
    numbers: Numbers,
    eps: float,
    bounds: tuple[int, ...],
    channels_last: bool,
    activation: str,
    folding: Folding | None,
    merges: bool,
) -> tuple[Array, Array, Array | None]:
    x, gamma, beta, residual, *of_running, told, out = operands[:10]
    x, residual = ready(x), None if residual is None else ready(residual)
    channels, groups = x.shape[-1 if channels_last else 1], len(bounds) - 1
    y = destination(out, x)
    # Those of each group begin at a multiple of 16 bytes.
    statistics = empty((groups, -(-len(ROWS) * channels // 4) * 4), accumulation_dtype(x.dtype), x)
    parts = zip(*(_groups(one, bounds) for one in (x, residual, y)), _statistics(statistics, channels), strict=True)
    words, of_groups = operands[10:] or [None] * groups, numbers[_OF_MERGE:]
    for group, (own, of_residual, target, kept) in enumerate(parts):
        arrays = (own, gamma, beta, of_residual, *[None] * 4, target, words[group], kept)
        batch_norm.forward(
            arrays, (eps, channels_last, activation, None), of_groups[_OF_GROUP * group : _OF_GROUP * (group + 1)]
        )
    y = delivered(y, out)
    if not merges:
        return y, statistics, None
    merged, _ = merge_parts((statistics, told, *of_running), (channels, folding), numbers[:_OF_MERGE])
    return y, statistics, merged


@Launcher
def _backward(
    operands: Operands, numbers: Numbers, bounds: tuple[int, ...], channels_last: bool, activation: str
) -> tuple[Array, Array, Array, Array | None]:
    dy, x, statistics, residual, out, *words = operands
    dy, x, statistics = ready(dy), ready(x), ready(statistics)
    residual = None if residual is None else ready(residual)
    channels, groups = x.shape[-1 if channels_last else 1], len(bounds) - 1
    dx, dresidual = destination(out, x), None if residual is None else empty(x.shape, x.dtype, x)
    sums = empty((groups, 2, channels), statistics.dtype, x)
    of_channels = x.program.views(sums, range(0, 2 * groups * channels, channels), [(channels,)] * 2 * groups)
    parts = zip(
        *(_groups(one, bounds) for one in (dy, x, residual, dx, dresidual)),
        _statistics(statistics, channels),
        strict=True,
    )
    for group, (own_dy, own, of_residual, own_dx, own_dresidual, kept) in enumerate(parts):
        targets = (own_dx, *of_channels[2 * group : 2 * group + 2], own_dresidual)
        arrays = (own_dy, own, kept, of_residual, *targets, words[group] if words else None)
        batch_norm.backward(arrays, (channels_last, activation), numbers[group : group + 1])
    return delivered(dx, out), *add_gradients((sums, None)), dresidual
