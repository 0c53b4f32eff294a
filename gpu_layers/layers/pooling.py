"""Pooling layers."""

from __future__ import annotations

from typing import Any

from gpu_layers.layers.base import Layer
from gpu_layers.ops.checks import check_integer
from gpu_layers.ops.pooling import (
    avg_pool_backward,
    avg_pool_forward,
    check_window,
    max_pool_backward,
    max_pool_forward,
    max_pool_indices,
    per_axis,
)


class _Pool(Layer):
    """What the pooling layers share: the window's numbers, checked when the layer is made."""

    _rank: int

    def __init__(self, kernel_size: Any, stride: Any, padding: Any, dilation: Any, channels_last: bool) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.channels_last = bool(channels_last)
        self._kernel = per_axis(kernel_size, self._rank, "kernel_size")
        check_window(
            self._kernel,
            per_axis(self.stride, self._rank, "stride"),
            per_axis(padding, self._rank, "padding"),
            per_axis(dilation, self._rank, "dilation"),
        )


class MaxPool2d(_Pool):
    """Largest value of each window.

    Parameters
    ----------
    kernel_size : int or tuple of two int
    stride : int or tuple of two int, optional
        kernel_size by default.
    padding : int or tuple of two int
        At most half the effective kernel size; padding is never chosen.
    dilation : int or tuple of two int
    return_indices : bool
        Whether forward also returns the flat index in the input plane of each maximum (int64).
    ceil_mode : bool
        Round the output size up.
    channels_last : bool
        Input is (N, H, W, C) instead of (N, C, H, W).

    Raises
    ------
    TypeError, ValueError
        For numbers that make no window.
    """

    _rank = 2

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, channels_last)
        self.return_indices, self.ceil_mode = bool(return_indices), bool(ceil_mode)

    def forward(self, x: Any) -> Any:
        """Pool a batch, or one sample without its batch axis.

        Returns
        -------
        y : array
        indices : array of int64
            Only if return_indices.
        """
        y, self._saved = max_pool_forward(
            x,
            self._kernel,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            channels_last=self.channels_last,
        )
        return (y, max_pool_indices(self._saved)) if self.return_indices else y

    def backward(self, dy: Any) -> Any:
        """Each gradient at the element that won its window."""
        return max_pool_backward(dy, self._saved_by_forward())

    def _configuration(self) -> str:
        extras = ", channels_last=True" if self.channels_last else ""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}{extras}"
        )


class AvgPool2d(_Pool):
    """Mean of each window.

    Parameters
    ----------
    kernel_size : int or tuple of two int
    stride : int or tuple of two int, optional
        kernel_size by default.
    padding : int or tuple of two int
        Zeros; at most half the kernel size.
    ceil_mode : bool
        Round the output size up.
    count_include_pad : bool
        Whether padding counts in the divisor.
    divisor_override : int, optional
        Divide by this instead.
    dilation : int or tuple of two int
    channels_last : bool
        Input is (N, H, W, C) instead of (N, C, H, W).

    Raises
    ------
    TypeError, ValueError
        For numbers that make no window, or a zero divisor.
    """

    _rank = 2

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        dilation: Any = 1,
        channels_last: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, channels_last)
        self.ceil_mode, self.count_include_pad = bool(ceil_mode), bool(count_include_pad)
        if divisor_override is not None:
            divisor_override = check_integer(divisor_override, "divisor_override", -(2**31), 2**31 - 1)
            if divisor_override == 0:
                raise ValueError("divisor must be not zero")
        self.divisor_override = divisor_override

    def forward(self, x: Any) -> Any:
        """Pool a batch, or one sample without its batch axis."""
        y, self._saved = avg_pool_forward(
            x,
            self._kernel,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
            divisor_override=self.divisor_override,
            channels_last=self.channels_last,
        )
        return y

    def backward(self, dy: Any) -> Any:
        """Each gradient, spread over the elements of its window."""
        return avg_pool_backward(dy, self._saved_by_forward())

    def _configuration(self) -> str:
        extras = "" if self.dilation == 1 else f", dilation={self.dilation}"
        extras += ", channels_last=True" if self.channels_last else ""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}{extras}"
