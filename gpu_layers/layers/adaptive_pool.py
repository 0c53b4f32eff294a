"""Adaptive pooling layers: the windows follow from the output's size."""

from __future__ import annotations

from typing import Any, ClassVar

from gpu_layers.core.array import Array
from gpu_layers.layers.pool_base import Pool
from gpu_layers.ops.avg_pool import adaptive_avg_pool_forward, avg_pool_backward
from gpu_layers.ops.max_pool import adaptive_max_pool_forward, max_pool_backward, max_pool_indices
from gpu_layers.ops.pool_arguments import OutputSize, check_output_size

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
]


class _AdaptivePool(Pool):
    """What both kinds share."""

    _operation: ClassVar[Any]
    return_indices = False

    def __init__(self, output_size: OutputSize, channels_last: bool) -> None:
        super().__init__()
        self.output_size = output_size
        self.channels_last = bool(channels_last)
        self._sizes = check_output_size(output_size, self._rank)

    def forward(self, x: Array) -> Array:
        """Pool a batch, or one sample without its batch axis.

        Parameters
        ----------
        x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing

        Returns
        -------
        y : array
            x's dtype.
        indices : array of int64
            Only if return_indices.

        Raises
        ------
        TypeError, ValueError
            For a wrong array type, dtype or rank, an empty channel or spatial axis, or a window that does not fit.
        """
        y, self._saved = self._operation(x, self._sizes, channels_last=self.channels_last)
        return (y, max_pool_indices(self._saved)) if self.return_indices else y

    def _configuration(self) -> str:
        return f"output_size={self.output_size}{', channels_last=True' if self.channels_last else ''}"


class _AdaptiveAvgPool(_AdaptivePool):
    """Mean of each window; the windows follow from the output's size.

    Window i of an axis of L inputs and o outputs is ``floor(i L / o) .. ceil((i + 1) L / o) - 1``.

    Parameters
    ----------
    output_size : int, None, or tuple of int or None
        One for all spatial axes, or one for each; None keeps the input's size.
    channels_last : bool
        Input is (N, *spatial, C) instead of (N, C, *spatial).

    Raises
    ------
    TypeError, ValueError
        For sizes that are not valid.
    """

    _operation, _gradient = staticmethod(adaptive_avg_pool_forward), staticmethod(avg_pool_backward)

    def __init__(self, output_size: OutputSize, *, channels_last: bool = False) -> None:
        super().__init__(output_size, channels_last)


class _AdaptiveMaxPool(_AdaptivePool):
    """Largest value of each window; the windows follow from the output's size.

    Window i of an axis of L inputs and o outputs is ``floor(i L / o) .. ceil((i + 1) L / o) - 1``.

    Parameters
    ----------
    output_size : int, None, or tuple of int or None
        One for all spatial axes, or one for each; None keeps the input's size.
    return_indices : bool
        Whether forward also returns the flat index in the input plane of each maximum (int64).
    channels_last : bool
        Input is (N, *spatial, C) instead of (N, C, *spatial).

    Raises
    ------
    TypeError, ValueError
        For sizes that are not valid.
    """

    _operation, _gradient = staticmethod(adaptive_max_pool_forward), staticmethod(max_pool_backward)

    def __init__(self, output_size: OutputSize, return_indices: bool = False, *, channels_last: bool = False) -> None:
        super().__init__(output_size, channels_last)
        self.return_indices = bool(return_indices)


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    _rank = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    _rank = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    _rank = 3


class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    _rank = 1


class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    _rank = 2


class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    _rank = 3
