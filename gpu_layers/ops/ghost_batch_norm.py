"""Batch norm of groups of samples as a stateless pair."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gpu_layers.moments import Moments, merged
from gpu_layers.ops.batch_norm import BatchNormSaved, batch_norm_backward, batch_norm_forward
from gpu_layers.ops.checks import check_gradient
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.cuda import array_module


@dataclass(frozen=True)
class GhostBatchNormSaved:
    """What backward needs.

    Attributes
    ----------
    x : array
        The input.
    bounds : tuple of int
        Where groups begin and end on the first axis.
    groups : tuple of BatchNormSaved
        One a group.
    """

    x: Any
    bounds: tuple[int, ...]
    groups: tuple[BatchNormSaved, ...]

    def moments(self) -> Moments:
        """Of the whole batch, merged from the groups in their order."""
        parts = [Moments.of(group.count, group.mean, group.var) for group in self.groups]
        return merged(parts) or parts[0]


def ghost_batch_norm_forward(
    x: Any, gamma: Any, beta: Any, *, bounds: tuple[int, ...], residual: Any = None, **options: Any
) -> tuple[Any, GhostBatchNormSaved]:
    """:func:`batch_norm_forward` of each group for itself, in the order of the groups.

    Parameters
    ----------
    x, gamma, beta, residual, **options
        As there.
    bounds : tuple of int
        From 0 to ``x.shape[0]``: group g is ``x[bounds[g]:bounds[g + 1]]``.

    Returns
    -------
    y : array
        Written by each group's kernels and copied to its place: one more read and write than without groups.
    saved : GhostBatchNormSaved

    Raises
    ------
    TypeError, ValueError
        As there, also for a group of one value a channel.
    """
    groups = []
    y: Any = None
    for start, stop in pairwise(bounds):
        own = None if residual is None else residual[start:stop]
        part, saved = batch_norm_forward(x[start:stop], gamma, beta, residual=own, **options)
        groups.append(saved)
        if len(bounds) == 2:
            return part, GhostBatchNormSaved(x, bounds, tuple(groups))
        y = array_module(x).empty(x.shape, x.dtype) if y is None else y
        y[start:stop] = part
    return y, GhostBatchNormSaved(x, bounds, tuple(groups))


def ghost_batch_norm_backward(dy: Any, saved: GhostBatchNormSaved) -> tuple[Any, ...]:
    """Gradients of :func:`ghost_batch_norm_forward`: those of each group; dgamma and dbeta are summed in float64.

    Returns
    -------
    dx, dgamma, dbeta, dresidual
        As :func:`batch_norm_backward`.
    """
    backend_for(dy, saved.x)
    check_gradient(dy, saved.x.shape, saved.x.dtype)
    if len(saved.groups) == 1:
        return batch_norm_backward(dy, saved.groups[0])
    xp = array_module(dy)
    sums: list[Any] = [0.0, 0.0]
    inputs: list[Any] = []
    for (start, stop), group in zip(pairwise(saved.bounds), saved.groups, strict=True):
        dx, dgamma, dbeta, *dresidual = batch_norm_backward(dy[start:stop], group)
        sums = [total + part.astype(np.float64) for total, part in zip(sums, (dgamma, dbeta), strict=True)]
        parts = (dx, *dresidual)
        inputs = inputs or [xp.empty(dy.shape, dy.dtype) for _ in parts]
        for whole, part in zip(inputs, parts, strict=True):
            whole[start:stop] = part
    dtype = saved.groups[0].mean.dtype
    return (inputs[0], *(total.astype(dtype) for total in sums), *inputs[1:])
