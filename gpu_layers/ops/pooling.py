"""Max and average pooling as stateless pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.ops.checks import check_dtype, check_gradient, check_integer
from gpu_layers.runtime.backend import backend_for
from gpu_layers.window import Sizes, Window, sliding_window


@dataclass(frozen=True)
class MaxPoolSaved:
    """What backward needs.

    Attributes
    ----------
    taps : array of uint8 (uint16, uint32 for windows of more than 256, 65,536 taps)
        Shape of the (batched) output: number of the tap that won.
    window : Window
    output_shape : tuple of int
    dtype : numpy.dtype
    channels_last, batched : bool
    """

    taps: Any
    window: Window
    output_shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool
    batched: bool


@dataclass(frozen=True)
class AvgPoolSaved:
    """What backward needs: shapes only.

    Attributes
    ----------
    window : Window
    output_shape : tuple of int
    dtype : numpy.dtype
    channels_last, batched, count_include_pad : bool
    divisor_override : int or None
    """

    window: Window
    output_shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool
    batched: bool
    count_include_pad: bool
    divisor_override: int | None


def max_pool_forward(
    x: Any,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    channels_last: bool = False,
) -> tuple[Any, MaxPoolSaved]:
    """Largest value of each window.

    Padding is never chosen; the first of equal maxima wins (taps in order, last axis fastest); NaN propagates, and
    of several the last one is taken.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing
        float16, bfloat16, float32 or float64.
    kernel_size : tuple of int
        One a spatial axis.
    stride : int or tuple of int, optional
        kernel_size by default.
    padding : int or tuple of int
        At most half the effective kernel size.
    dilation : int or tuple of int
    ceil_mode : bool
        Round the output size up; the last window still starts inside the input or its leading padding.
    channels_last : bool

    Returns
    -------
    y : array
    saved : MaxPoolSaved
        One byte an output for windows of at most 256 taps; :func:`max_pool_indices` decodes it.

    Raises
    ------
    TypeError
        For a wrong array type, dtype or number type.
    ValueError
        For a wrong rank, an empty channel or spatial axis, or a window that does not fit.
    """
    backend = backend_for(x)
    check_dtype(x)
    batched, window = _place_window(x, kernel_size, stride, padding, dilation, ceil_mode, channels_last)
    y, taps = backend.max_pool_forward(x if batched else x[None], window, channels_last)
    y = y if batched else y[0]
    return y, MaxPoolSaved(taps, window, y.shape, x.dtype, channels_last, batched)


def max_pool_backward(dy: Any, saved: MaxPoolSaved) -> Any:
    """Send each gradient to the element that won its window. The sum of gradients is preserved.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : MaxPoolSaved

    Returns
    -------
    array
        Shape and dtype of x.
    """
    backend = backend_for(dy, saved.taps)
    check_gradient(dy, saved.output_shape, saved.dtype)
    dx = backend.max_pool_backward(dy if saved.batched else dy[None], saved.taps, saved.window, saved.channels_last)
    return dx if saved.batched else dx[0]


def max_pool_indices(saved: MaxPoolSaved) -> Any:
    """Flat index in the input plane of each maximum, as PyTorch's ``return_indices=True`` gives it.

    Returns
    -------
    array of int64
        y's shape; -1 for a (dilated) window with no tap inside the input.
    """
    indices = backend_for(saved.taps).max_pool_indices(saved.taps, saved.window, saved.channels_last)
    return indices if saved.batched else indices[0]


def avg_pool_forward(
    x: Any,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    channels_last: bool = False,
) -> tuple[Any, AvgPoolSaved]:
    """Mean of each window: its sum, over ``divisor_override``, else over its taps within the padded extent if
    ``count_include_pad``, else over its taps inside the input.

    Parameters
    ----------
    x, kernel_size, stride, padding, dilation, ceil_mode, channels_last
        As in :func:`max_pool_forward`.
    count_include_pad : bool
    divisor_override : int, optional
        Not 0.

    Returns
    -------
    y : array
        Summed in float32 for half types.
    saved : AvgPoolSaved
        Shapes only.

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool_forward`; ValueError for a zero divisor.
    """
    backend = backend_for(x)
    check_dtype(x)
    if divisor_override is not None:
        divisor_override = check_integer(divisor_override, "divisor_override", -(2**31), 2**31 - 1)
        if divisor_override == 0:
            raise ValueError("divisor must be not zero")
    batched, window = _place_window(x, kernel_size, stride, padding, dilation, ceil_mode, channels_last)
    include = bool(count_include_pad)
    y = backend.avg_pool_forward(x if batched else x[None], window, channels_last, include, divisor_override)
    y = y if batched else y[0]
    return y, AvgPoolSaved(window, y.shape, x.dtype, channels_last, batched, include, divisor_override)


def avg_pool_backward(dy: Any, saved: AvgPoolSaved) -> Any:
    """Spread each gradient evenly over its window's taps inside the input.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : AvgPoolSaved

    Returns
    -------
    array
        Shape and dtype of x.
    """
    backend = backend_for(dy)
    check_gradient(dy, saved.output_shape, saved.dtype)
    dx = backend.avg_pool_backward(
        dy if saved.batched else dy[None],
        saved.window,
        saved.channels_last,
        saved.count_include_pad,
        saved.divisor_override,
    )
    return dx if saved.batched else dx[0]


def per_axis(value: int | Sequence[int], rank: int, name: str) -> Sizes:
    """One integer a spatial axis.

    Parameters
    ----------
    value : int or sequence of int
        One for all axes, or one an axis.
    rank : int
        Number of spatial axes.
    name : str
        For the message.

    Raises
    ------
    TypeError
        If it holds something other than integers.
    ValueError
        If there are not ``rank`` of them.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name} must be an int, or {rank} of them, one a spatial axis, got {value}")
    return tuple(check_integer(v, name, -(2**31), 2**31 - 1) for v in values)


def check_window(kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> None:
    """ValueError unless every number of the window is one that PyTorch takes, in its words."""
    for name, sizes in (("kernel size", kernel), ("stride", stride), ("dilation", dilation)):
        if min(sizes) < 1:
            raise ValueError(f"{name} should be greater than zero, but got {name}={list(sizes)}")
    if min(padding) < 0:
        raise ValueError(f"pad must be non-negative, but got pad: {min(padding)}")
    for k, pad, d in zip(kernel, padding, dilation, strict=True):
        if pad > (d * (k - 1) + 1) // 2:
            raise ValueError(
                "pad should be at most half of effective kernel size, "
                f"but got pad={pad}, kernel_size={k} and dilation={d}"
            )


def _place_window(
    x: Any,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
    channels_last: bool,
) -> tuple[bool, Window]:
    """Whether x is batched, and the window over its spatial axes."""
    if not isinstance(kernel_size, (tuple, list)):
        raise TypeError(f"kernel_size must be a tuple, one int a spatial axis, got {type(kernel_size).__name__}")
    rank = len(kernel_size)
    if rank not in (1, 2, 3):
        raise ValueError(f"kernel_size must have 1 to 3 elements, one a spatial axis, got {len(kernel_size)}")
    kernel = per_axis(kernel_size, rank, "kernel_size")
    strides = kernel if stride is None else per_axis(stride, rank, "stride")
    pads = per_axis(padding, rank, "padding")
    dilations = per_axis(dilation, rank, "dilation")
    check_window(kernel, strides, pads, dilations)
    message = (
        f"Expected {rank + 1}D or {rank + 2}D (batch mode) tensor with optional 0 dim batch size for input, "
        f"but got:{list(x.shape)}"
    )
    if x.ndim not in (rank + 1, rank + 2):
        raise ValueError(message)
    batched = x.ndim == rank + 2
    image = x.shape[1:] if batched else x.shape
    channels, spatial = (image[-1], image[:-1]) if channels_last else (image[0], image[1:])
    if channels == 0 or 0 in spatial:
        raise ValueError(message)
    return batched, sliding_window(kernel, strides, dilations, pads, pads, bool(ceil_mode), spatial)
