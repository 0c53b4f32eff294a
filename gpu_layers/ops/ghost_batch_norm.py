"""Batch norm of groups of samples as a stateless pair."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_integer
from gpu_layers.core.cuda import array_module, place_of, placed
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.ops.batch_norm import (
    BatchNormSaved,
    batch_norm_backward_into,
    check_count,
    check_input,
    checked_forward,
)
from gpu_layers.ops.checks import check_eps, check_gradient
from gpu_layers.ops.padding import positions_of
from gpu_layers.runtime.backend import backend_for

__all__ = ["GhostBatchNormSaved", "ghost_batch_norm_backward", "ghost_batch_norm_forward"]


@dataclass(slots=True)
class GhostBatchNormSaved:
    """What backward needs.

    Attributes
    ----------
    x : array
        The input.
    bounds : tuple of int
        Where groups begin and end on the first axis.
    groups : tuple of BatchNormSaved
        One for each group.
    statistics : array, shape (groups, at least 5 C)
        Of each group, one after the other.
    """

    x: Array
    bounds: tuple[int, ...]
    groups: tuple[BatchNormSaved, ...]
    statistics: Array

    def merged(self, running: RunningStatistics | None = None) -> tuple[Any, int]:
        """Mean and biased variance of the whole batch, shape (2, C), and its values per channel.

        They are merged in the order of the groups, and folded into ``running``, if it is given.
        """
        counts, channels = tuple(group.count for group in self.groups), self.groups[0].mean.size
        with place_of(self.x):
            return backend_for(self.x).batch_norm_merge_parts(self.statistics, counts, channels, running)


@placed
def ghost_batch_norm_forward(
    x: Array,
    gamma: Array,
    beta: Array,
    *,
    bounds: tuple[int, ...],
    eps: float = 1e-5,
    residual: Array = None,
    activation: str | None = None,
    channels_last: bool = False,
    valid: ValidPositions | None = None,
) -> tuple[Array, GhostBatchNormSaved]:
    """:func:`batch_norm_forward` of each group of samples, in the order of the groups.

    Kernels read and write each group in place in the whole arrays, if its address is a multiple of 16 bytes. Otherwise
    the group is copied.

    Parameters
    ----------
    x, gamma, beta, eps, residual, activation, channels_last
        As in :func:`batch_norm_forward`.
    bounds : tuple of int
        From 0 to ``x.shape[0]``, ascending: group g is ``x[bounds[g]:bounds[g + 1]]``.
    valid : ValidPositions, optional
        Of a padded batch, the positions that count; y and the gradients are +0 at others.

    Returns
    -------
    y : array
        x's shape and dtype.
    saved : GhostBatchNormSaved
        For :func:`ghost_batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_forward`, also for a group with a single value per channel, and for bounds that do not
        cover all of x.
    """
    backend = backend_for(x, optional=(gamma, beta, residual))
    channels, phi = check_input(x, gamma, beta, channels_last, residual, activation)
    eps, bounds = check_eps(eps, accumulation_dtype(x.dtype)), _checked_bounds(bounds, x.shape[0])
    parts = [
        (start, stop, None if valid is None else positions_of(valid.mask[start:stop], x))
        for start, stop in pairwise(bounds)
    ]
    for start, stop, of_group in parts:
        check_count(x[start:stop], channels, of_group)
    xp = array_module(x)
    y = xp.empty(x.shape, x.dtype)
    # Those of each group begin at a multiple of 16 bytes, where kernels can read them.
    size = 5 * channels
    statistics = xp.empty((len(parts), -(-size // 4) * 4), accumulation_dtype(x.dtype))
    groups = []
    for (start, stop, of_group), kept in zip(parts, statistics[:, :size], strict=True):
        own = None if residual is None else residual[start:stop]
        group, target = x[start:stop], y[start:stop]
        arguments = (group, gamma, beta, eps, own, phi, channels_last, target, None, of_group)
        groups.append(checked_forward(backend, *arguments, kept.reshape(5, channels))[1])
    return y, GhostBatchNormSaved(x, bounds, tuple(groups), statistics)


def _checked_bounds(bounds: Any, samples: int) -> tuple[int, ...]:
    own = tuple(check_integer(bound, "bounds", 0, samples) for bound in bounds)
    if len(own) < 2 or own[0] != 0 or own[-1] != samples or any(stop < start for start, stop in pairwise(own)):
        raise ValueError(f"bounds must ascend from 0 to the input's {samples} samples, got {own}")
    return own


@placed
def ghost_batch_norm_backward(dy: Array, saved: GhostBatchNormSaved) -> tuple[Array, ...]:
    """Gradients of :func:`ghost_batch_norm_forward`: those of each group. A kernel adds dgamma and dbeta in float64.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : GhostBatchNormSaved

    Returns
    -------
    dx, dgamma, dbeta, dresidual : array
        As :func:`batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`batch_norm_backward`.
    """
    backend = backend_for(dy, saved.x)
    check_gradient(dy, saved.x.shape, saved.x.dtype)
    for group in saved.groups:
        group.check_unwritten()
    xp, first = array_module(dy), saved.groups[0]
    dx = xp.empty(dy.shape, dy.dtype)
    dresidual = None if first.residual is None else xp.empty(dy.shape, dy.dtype)
    sums = xp.empty((len(saved.groups), 2, first.mean.size), first.mean.dtype)
    for (start, stop), group, of_channels in zip(pairwise(saved.bounds), saved.groups, sums, strict=True):
        own = None if dresidual is None else dresidual[start:stop]
        batch_norm_backward_into((dx[start:stop], *of_channels, own), dy[start:stop], group)
    gradients = (dx, *backend.batch_norm_add_gradients(sums))
    return gradients if dresidual is None else (*gradients, dresidual)
