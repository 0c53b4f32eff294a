"""Batch norm of groups of samples as a stateless pair."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.core.batch_norm_saved import GhostBatchNormSaved
from gpu_layers.core.checks import check_integer
from gpu_layers.core.cuda import place_of
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.core.valid import ValidPositions
from gpu_layers.ops.batch_norm import batch_norm_backward, check_input, checked_forward
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_eps, check_gradient
from gpu_layers.ops.output import claim, claim_elementwise
from gpu_layers.ops.padding import part_of
from gpu_layers.runtime.backend import backend_for

__all__ = ["GhostBatchNormSaved", "ghost_batch_norm_backward", "ghost_batch_norm_forward"]


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
    out: Array = None,
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
    out : array, optional
        Where to write y; must not overlap x or residual.

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
    backend = backend_for(x, optional=(gamma, beta, residual, out))
    phi, eps, bounds, before = _checked((x, gamma, beta, residual), activation, channels_last, eps, bounds)
    if valid is not None:
        before = valid.before
    given = (x, gamma, beta, eps, bounds, before, residual, phi, channels_last, valid)
    return checked_ghost_forward(backend, *given, out=out)[:2]


def checked_ghost_forward(
    backend: ModuleType,
    x: Array,
    gamma: Array,
    beta: Array,
    eps: float,
    bounds: tuple[int, ...],
    before: Sequence[int],
    residual: Array,
    activation: str,
    channels_last: bool,
    valid: ValidPositions | None,
    merges: bool = False,
    running: RunningStatistics | None = None,
    out: Array = None,
) -> tuple[Array, GhostBatchNormSaved, Array]:
    """:func:`ghost_batch_norm_forward` of checked arguments, of which ``out`` is claimed here.

    Parameters
    ----------
    before : sequence of int
        :func:`values_before`.
    merges : bool
        Whether the last result is mean and biased variance of the whole batch, shape (2, C); None if not.
    running : RunningStatistics, optional
        These are folded in there.
    """
    parts: tuple[ValidPositions, ...] = ()
    if before[-1] == 0:
        if out is not None:
            claim(out, x.shape, x.dtype, x, residual)
        given = (x, gamma, beta, eps, residual, activation, channels_last, out, running, valid)
        y, whole = checked_forward(backend, *given)
        bounds, parts, statistics = (
            (0, x.shape[0]),
            parts if valid is None else (valid,),
            whole.statistics.reshape(1, -1),
        )
        saved = GhostBatchNormSaved(x, bounds, statistics, channels_last, residual, activation, valid=parts)
        return y, saved, whole.statistics[:2]
    bounds, counts = _not_empty(bounds, before)
    if 1 in counts:
        group = counts.index(1)
        channels = x.shape[-1 if channels_last else 1]
        shape = [bounds[group + 1] - bounds[group], *x.shape[1:]] if valid is None else [1, channels]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if out is not None:
        claim(out, x.shape, x.dtype, x, residual)
    if valid is not None:
        with place_of(x):
            parts = tuple([part_of(valid, start, stop, x) for start, stop in pairwise(bounds)])
    y, statistics, merged = backend.ghost_batch_norm_forward(
        x,
        gamma,
        beta,
        eps,
        bounds,
        channels_last,
        residual,
        activation,
        parts,
        counts if merges else None,
        running,
        out,
    )
    return y, GhostBatchNormSaved(x, bounds, statistics, channels_last, residual, activation, valid=parts), merged


def values_before(x: Array, channels_last: bool, valid: ValidPositions | None) -> Sequence[int]:
    """Values of a channel before each sample, and all of them."""
    if valid is not None:
        return valid.before
    of_sample = x.size // max(x.shape[0] * x.shape[-1 if channels_last else 1], 1)
    return range(0, x.shape[0] * of_sample + 1, of_sample) if of_sample else (0,) * (x.shape[0] + 1)


@lru_cache(maxsize=1024)
def _not_empty(bounds: tuple[int, ...], before: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bounds of the groups that have values, and how many of a channel each has."""
    inner = [stop for start, stop in pairwise(bounds) if before[start] < before[stop] < before[-1]]
    bounds = (0, *inner, bounds[-1])
    return bounds, tuple([before[stop] - before[start] for start, stop in pairwise(bounds)])


@Checked
def _checked(
    arrays: tuple[Array, ...], activation: str | None, channels_last: bool, eps: float, bounds: Any
) -> tuple[str, float, tuple[int, ...], Sequence[int]]:
    """The activation's name, eps and bounds; and :func:`values_before`, if all values count."""
    x, gamma, beta, residual = arrays
    _, phi = check_input(x, gamma, beta, channels_last, residual, activation)
    eps, samples = check_eps(eps, accumulation_dtype(x.dtype)), x.shape[0]
    own = tuple(check_integer(bound, "bounds", 0, samples) for bound in bounds)
    if len(own) < 2 or own[0] != 0 or own[-1] != samples or any(stop < start for start, stop in pairwise(own)):
        raise ValueError(f"bounds must ascend from 0 to the input's {samples} samples, got {own}")
    return phi, eps, own, values_before(x, channels_last, None)


def ghost_batch_norm_backward(dy: Array, saved: GhostBatchNormSaved, *, out: Array = None) -> tuple[Array, ...]:
    """Gradients of :func:`ghost_batch_norm_forward`: those of each group. A kernel adds dgamma and dbeta in float64.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : GhostBatchNormSaved
    out : array, optional
        Where to write dx; may be dy, must not overlap x or the residual.

    Returns
    -------
    dx, dgamma, dbeta, dresidual : array
        As :func:`batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`batch_norm_backward`.
    """
    backend = backend_for(dy, saved.x, optional=(out,))
    check_gradient(dy, saved.x.shape, saved.x.dtype)
    saved.check_unwritten()
    if len(saved.bounds) == 2:
        return batch_norm_backward(dy, saved.groups[0], out=out)
    if out is not None:
        dy = claim_elementwise(out, dy, apart=(saved.x, saved.residual))
    gradients = backend.ghost_batch_norm_backward(dy, saved, out)
    return gradients[:3] if saved.residual is None else gradients
