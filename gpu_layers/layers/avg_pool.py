"""Average pooling layers."""

from __future__ import annotations

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.layers.pool_base import WindowPool
from gpu_layers.ops.avg_pool import avg_pool_backward, avg_pool_forward, check_divisor
from gpu_layers.ops.pool_arguments import Padding, PerAxis, per_axis

__all__ = ["AvgPool1d", "AvgPool2d", "AvgPool3d"]


class _AvgPool(WindowPool):
    """Mean of each window.

    Parameters
    ----------
    kernel_size : int or tuple of int
        One for all spatial axes, or one for each.
    stride : int or tuple of int, optional
        kernel_size by default.
    padding : int, tuple of int, tuple of (before, after), "same_upper" or "same_lower"
        Zeros. Integers: at most half the effective kernel size. Pairs, one for each axis: at most the effective kernel
        size minus one. "same_upper", "same_lower": as much as makes ``ceil(input / stride)`` outputs; an odd element
        goes to the end or to the start.
    ceil_mode : bool
        Round the output size up.
    count_include_pad : bool
        Whether padding counts in the divisor.
    divisor_override : int, optional
        Divide by this instead.
    dilation : int or tuple of int
    channels_last : bool
        Input is (N, *spatial, C) instead of (N, C, *spatial).

    Raises
    ------
    TypeError, ValueError
        For numbers that do not make a window, or a divisor of 0.
    """

    _gradient = staticmethod(avg_pool_backward)

    def __init__(
        self,
        kernel_size: PerAxis,
        stride: PerAxis | None = None,
        padding: Padding = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        dilation: PerAxis = 1,
        channels_last: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode, channels_last)
        self.count_include_pad = bool(count_include_pad)
        self.divisor_override = check_divisor(divisor_override)
        if self._rank == 1:
            # PyTorch keeps, and shows, tuples here, unlike in the other ranks.
            self.kernel_size, self.stride = self._kernel, per_axis(self.stride or self._kernel, 1, "stride")
            if isinstance(padding, int):
                self.padding = (padding,)

    def forward(self, x: Array, lengths: ArrayLike | None = None) -> Array:
        """Pool a batch, or one sample without its batch axis.

        Parameters
        ----------
        x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing
        lengths : array_like of int, shape (N, spatial axes), or (N,) for one axis; optional
            Size of each sample of a padded batch. Elements beyond do not count.

        Returns
        -------
        array
            x's dtype.

        Raises
        ------
        TypeError, ValueError
            For a wrong array type, dtype or rank, an empty channel or spatial axis, or a window that does not fit.
        """
        y, self._saved = avg_pool_forward(
            x,
            **self.window_arguments,
            count_include_pad=self.count_include_pad,
            divisor_override=self.divisor_override,
            channels_last=self.channels_last,
            lengths=lengths,
        )
        return y

    def _configuration(self) -> str:
        numbers = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return numbers + self._extras(show_dilation=True)


class AvgPool1d(_AvgPool):
    _rank = 1


class AvgPool2d(_AvgPool):
    _rank = 2


class AvgPool3d(_AvgPool):
    _rank = 3
