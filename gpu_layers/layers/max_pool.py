"""Max pooling layers."""

from __future__ import annotations

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.layers.pool_base import WindowPool
from gpu_layers.ops.max_pool import max_pool_backward, max_pool_forward, max_pool_indices
from gpu_layers.ops.pool_arguments import Padding, PerAxis

__all__ = ["MaxPool1d", "MaxPool2d", "MaxPool3d"]


class MaxPoolLayer(WindowPool):
    """Largest value of each window.

    Parameters
    ----------
    kernel_size : int or tuple of int
        One for all spatial axes, or one for each.
    stride : int or tuple of int, optional
        kernel_size by default.
    padding : int, tuple of int, tuple of (before, after), "same_upper" or "same_lower"
        Never chosen. Integers: at most half the effective kernel size. Pairs, one for each axis: at most the effective
        kernel size minus one. "same_upper", "same_lower": as much as makes ``ceil(input / stride)`` outputs; an odd
        element goes to the end or to the start.
    dilation : int or tuple of int
    return_indices : bool
        Whether forward also returns the flat index in the input plane of each maximum (int64).
    ceil_mode : bool
        Round the output size up.
    channels_last : bool
        Input is (N, *spatial, C) instead of (N, C, *spatial).

    Raises
    ------
    TypeError, ValueError
        For numbers that do not make a window.
    """

    _gradient = staticmethod(max_pool_backward)

    def __init__(
        self,
        kernel_size: PerAxis,
        stride: PerAxis | None = None,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode, channels_last)
        self.return_indices = bool(return_indices)

    def forward(self, x: Array, lengths: ArrayLike | None = None) -> Array:
        """Pool a batch, or one sample without its batch axis.

        Parameters
        ----------
        x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing
        lengths : array_like of int, shape (N, spatial axes), or (N,) for one axis; optional
            Size of each sample of a padded batch. Elements beyond do not count.

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
        y, self._saved = max_pool_forward(x, **self.window_arguments, channels_last=self.channels_last, lengths=lengths)
        return (y, max_pool_indices(self._saved)) if self.return_indices else y

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return self._rank

    def _configuration(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}{self._extras()}"
        )


class MaxPool1d(MaxPoolLayer):
    _rank = 1


class MaxPool2d(MaxPoolLayer):
    _rank = 2


class MaxPool3d(MaxPoolLayer):
    _rank = 3
