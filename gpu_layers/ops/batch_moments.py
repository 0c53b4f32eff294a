"""The statistics of a batch, without normalising it."""

from __future__ import annotations

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, placed
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.moments import Moments
from gpu_layers.core.valid import ValidPositions
from gpu_layers.ops.checks import check_dtype
from gpu_layers.runtime.backend import backend_for

__all__ = ["Moments"]


@placed
def batch_norm_moments(x: Array, *, channels_last: bool = False, valid: ValidPositions | None = None) -> Moments:
    """Count, mean and sum of squared deviations of each channel, by batch norm's own kernel: x is read once.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last
        A single value per channel is allowed here, and so is an empty batch.
    channels_last : bool
    valid : ValidPositions, optional
        Of a padded batch, the positions that count.

    Returns
    -------
    Moments

    Raises
    ------
    TypeError
        For a wrong array type or dtype.
    ValueError
        For an input of fewer than two axes.
    """
    count, statistics = statistics_of_part(x, channels_last, valid)
    return Moments.of(count, statistics[0], statistics[1])


def statistics_of_part(x: Array, channels_last: bool, valid: ValidPositions | None) -> tuple[int, Array]:
    """Values per channel, and an array of shape (2 or more, C) in the statistics' dtype: means and biased variances."""
    backend, count = backend_for(x), count_of_part(x, channels_last, valid)
    channels, xp, dtype = x.shape[-1 if channels_last else 1], array_module(x), accumulation_dtype(x.dtype)
    if count == 0:
        return 0, xp.zeros((2, channels), dtype)
    if count == 1:
        first = 0 if valid is None else valid.first
        values = x.reshape(-1, channels)[first] if channels_last else x.reshape(len(x), channels, -1)
        if not channels_last:
            sample, place = divmod(first, values.shape[2])
            values = values[sample, :, place]
        mean = values.astype(dtype)
        return 1, xp.stack([mean, mean - mean])
    return count, backend.batch_norm_statistics(x, None, None, 1.0, channels_last, None, valid)


def count_of_part(x: Array, channels_last: bool, valid: ValidPositions | None) -> int:
    """Values per channel of an input, which is checked."""
    check_dtype(x)
    if x.ndim < 2:
        raise ValueError(f"expected at least 2D input (got {x.ndim}D input)")
    if x.size == 0:
        return 0
    return x.size // x.shape[-1 if channels_last else 1] if valid is None else valid.count
