"""Power-average pooling layers."""

from __future__ import annotations

from gpu_layers.core.array import Array
from gpu_layers.layers.pool_base import WindowPool
from gpu_layers.ops.lp_pool import check_norm_type, lp_pool_backward, lp_pool_forward
from gpu_layers.ops.pool_arguments import Padding, PerAxis

__all__ = ["LPPool1d", "LPPool2d", "LPPool3d"]


class _LPPool(WindowPool):
    """``(sum |x|^p)^(1/p)`` of each window.

    Backward reads x, which must hold the values that it had in the forward; the gradient is 0 where x is 0.

    Parameters
    ----------
    norm_type : float
        p, above 0; inf takes the largest ``|x|``.
    kernel_size : int or tuple of int
        One for all spatial axes, or one for each.
    stride : int or tuple of int, optional
        kernel_size by default.
    ceil_mode : bool
        Round the output size up. The sum of a window that is cut off is scaled up to that of a whole one.
    padding : int, tuple of int, tuple of (before, after), "same_upper" or "same_lower"
        Zeros, as in :class:`MaxPool2d`.
    dilation : int or tuple of int
    channels_last : bool
        Input is (N, *spatial, C) instead of (N, C, *spatial).

    Raises
    ------
    TypeError, ValueError
        For numbers that do not make a window, or a p of 0 or less.
    """

    _gradient = staticmethod(lp_pool_backward)

    def __init__(
        self,
        norm_type: float,
        kernel_size: PerAxis,
        stride: PerAxis | None = None,
        ceil_mode: bool = False,
        *,
        padding: Padding = 0,
        dilation: PerAxis = 1,
        channels_last: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, ceil_mode, channels_last)
        check_norm_type(norm_type)
        self.norm_type = norm_type
        self.stride = stride  # PyTorch keeps, and shows, None here, unlike in the other poolings

    def forward(self, x: Array) -> Array:
        """Pool a batch, or one sample without its batch axis.

        Parameters
        ----------
        x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing

        Returns
        -------
        array
            x's dtype.

        Raises
        ------
        TypeError, ValueError
            For a wrong array type, dtype or rank, an empty channel or spatial axis, or a window that does not fit.
        """
        y, self._saved = lp_pool_forward(x, self.norm_type, **self.window_arguments, channels_last=self.channels_last)
        return y

    def _configuration(self) -> str:
        padding = "" if self.padding == 0 else f", padding={self.padding}"
        return (
            f"norm_type={self.norm_type}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"ceil_mode={self.ceil_mode}{padding}{self._extras(show_dilation=True)}"
        )


class LPPool1d(_LPPool):
    _rank = 1


class LPPool2d(_LPPool):
    _rank = 2


class LPPool3d(_LPPool):
    _rank = 3
