"""Functions of the poolings."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as reference

from gpu_layers.torch import arrays
from gpu_layers.torch.checks import check_same_device, check_tensor, fail_as_torch
from gpu_layers.torch.ops import pooling as pool_rows
from gpu_layers.torch.ops.pooling import Placing

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d",
    "adaptive_max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "max_pool1d",
    "max_pool1d_with_indices",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d",
    "max_pool3d_with_indices",
    "max_unpool1d",
    "max_unpool2d",
    "max_unpool3d",
]


def _per_axis(value: Any, rank: int) -> tuple:
    """One number per spatial axis, from one for all or as many as were given."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * rank if len(values) == 1 else values


def _numbers(kernel_size: Any, stride: Any, padding: Any, dilation: Any, rank: int) -> tuple | None:
    """Kernel, stride, padding and dilation, one per spatial axis; None where they make no window."""
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        stride = kernel_size
    found = []
    for value in (kernel_size, stride, padding, dilation):
        values = _per_axis(value, rank)
        if len(values) != rank:
            return None
        for one in values:
            # A size may be a symbol in a compiled graph.
            if not isinstance(one, (int, torch.SymInt)) or isinstance(one, bool):
                return None
        found.append(values)
    kernel, strides, pads, dilations = found
    for k, s, pad, d in zip(kernel, strides, pads, dilations, strict=True):
        if k < 1 or s < 1 or d < 1 or pad < 0 or 2 * pad > d * (k - 1) + 1:
            return None
    return kernel, strides, pads, dilations


def _fits(shape: Any, rank: int, window: tuple | None, ceil_mode: bool) -> bool:
    """Whether an input has spatial axes, none of them (nor the channels) empty, and a window fits in."""
    if window is None or len(shape) not in (rank + 1, rank + 2):
        return False
    image = shape[-rank - 1 :]
    for size in image:
        if size == 0:
            return False
    kernel, strides, pads, dilations = window
    sizes = pool_rows.output_sizes(image[1:], kernel, strides, pads, dilations, ceil_mode, ())
    return all(size >= 1 for size in sizes)


def _placed(
    shape: Any, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Placing | None:
    """A window over an input of this shape; None where it is none, or does not fit."""
    window = _numbers(kernel_size, stride, padding, dilation, rank)
    if window is None or not _fits(shape, rank, window, ceil_mode):
        return None
    return Placing(shape[-rank:], (*window, ceil_mode, ()))


_cached_place = lru_cache(maxsize=4096, typed=True)(_placed)


def _place(
    input: Tensor, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any
) -> Placing | None:
    ceil_mode = bool(ceil_mode)
    if not is_dynamo_compiling():
        try:
            return _cached_place(input.shape, rank, kernel_size, stride, padding, dilation, ceil_mode)
        except TypeError:  # lists, and sizes that are symbols, which are not hashable
            pass
    return _placed(input.shape, rank, kernel_size, stride, padding, dilation, ceil_mode)


def _max_pool(
    rank: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    return_indices: bool,
) -> Any:
    check_tensor(input)
    placing = _place(input, rank, kernel_size, stride, padding, dilation, ceil_mode)
    if placing is None:
        theirs = getattr(reference, f"max_pool{rank}d")
        fail_as_torch(
            f"max_pool{rank}d does not take these arguments",
            theirs,
            input,
            kernel_size,
            stride,
            padding,
            dilation,
            ceil_mode=ceil_mode,
            return_indices=return_indices,
        )
    channels_last = arrays.is_channels_last(input, rank)
    if not return_indices:
        return pool_rows.max_pool.first(input, placing, channels_last)
    return _with_indices(input, placing, channels_last)


def _with_indices(input: Tensor, placing: Placing, channels_last: bool) -> tuple[Tensor, Tensor]:
    y, argmax = pool_rows.max_pool(input, placing, channels_last)
    return y, pool_rows.max_pool_indices(argmax, placing, channels_last)


def max_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Largest value of each window of ``(N, C, L)`` or ``(C, L)``."""
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool1d_with_indices(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """:func:`max_pool1d`, and the indices of the maxima; ``return_indices`` is ignored."""
    return _max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Largest value of each window of ``(N, C, H, W)`` or ``(C, H, W)``."""
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """:func:`max_pool2d`, and the indices of the maxima; ``return_indices`` is ignored."""
    return _max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def max_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Largest value of each window of ``(N, C, D, H, W)`` or ``(C, D, H, W)``."""
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d_with_indices(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """:func:`max_pool3d`, and the indices of the maxima; ``return_indices`` is ignored."""
    return _max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def _avg_pool(
    rank: int,
    input: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    check_tensor(input)
    placing = _place(input, rank, kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override == 0 or placing is None:
        theirs = getattr(reference, f"avg_pool{rank}d")
        given = (kernel_size, () if stride is None else stride, padding, ceil_mode, count_include_pad)
        divisor = () if rank == 1 else (divisor_override,)
        fail_as_torch(f"avg_pool{rank}d does not take these arguments", theirs, input, *given, *divisor)
    channels_last = arrays.is_channels_last(input, rank)
    return pool_rows.avg_pool(input, placing, bool(count_include_pad), divisor_override, channels_last)


def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Mean of each window of ``(N, C, L)`` or ``(C, L)``."""
    return _avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean of each window of ``(N, C, H, W)`` or ``(C, H, W)``."""
    return _avg_pool(2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def avg_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean of each window of ``(N, C, D, H, W)`` or ``(C, D, H, W)``."""
    return _avg_pool(3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _lp_pool(rank: int, input: Tensor, norm_type: float, kernel_size: Any, stride: Any, ceil_mode: bool) -> Tensor:
    check_tensor(input)
    placing = _place(input, rank, kernel_size, stride, 0, 1, ceil_mode)
    if placing is None:
        fail_as_torch(
            f"lp_pool{rank}d does not take these arguments",
            getattr(reference, f"lp_pool{rank}d"),
            input,
            norm_type,
            kernel_size,
            stride,
            ceil_mode,
        )
    norm_type = float(norm_type)
    # Compared, not math.isinf: a compiled graph may hold a symbol for the number.
    if norm_type == math.inf or norm_type == -math.inf:
        sign = 1 if norm_type > 0 else -1
        x = sign * input.abs()
        return sign * pool_rows.max_pool.first(x, placing, arrays.is_channels_last(x, rank))
    if not norm_type > 0:
        raise ValueError(f"norm_type must be greater than zero, got {norm_type}")
    channels_last = arrays.is_channels_last(input, rank)
    return pool_rows.lp_pool(input, placing, norm_type, channels_last)


def lp_pool1d(input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:
    """``(sum |x|^p)^(1/p)`` of each window of ``(N, C, L)`` or ``(C, L)``; torch's for x >= 0."""
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:
    """``(sum |x|^p)^(1/p)`` of each window of ``(N, C, H, W)`` or ``(C, H, W)``; torch's for x >= 0."""
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(input: Tensor, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Tensor:
    """``(sum |x|^p)^(1/p)`` of each window of ``(N, C, D, H, W)`` or ``(C, D, H, W)``; torch's for x >= 0."""
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)


def _adaptive(shape: Any, rank: int, output_size: Any) -> Placing | None:
    """The windows that cut an input of this shape into an output of this size; None where there are none."""
    if not isinstance(output_size, (tuple, list)):
        output_size = (output_size,) * rank
    elif len(output_size) == 1:
        output_size = tuple(output_size) * rank
    if len(output_size) != rank or len(shape) not in (rank + 1, rank + 2):
        return None
    image = shape[-rank - 1 :]
    for size in image:
        if size == 0:
            return None
    sizes = tuple(own if size is None else size for size, own in zip(output_size, image[1:], strict=True))
    for size in sizes:
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool) or size < 0:
            return None
    return Placing(shape[-rank:], ((), (), (), (), False, sizes))


_cached_adaptive = lru_cache(maxsize=4096, typed=True)(_adaptive)


def _adaptive_place(input: Tensor, output_size: Any, rank: int) -> Placing | None:
    if is_dynamo_compiling():
        return _adaptive(input.shape, rank, output_size)
    try:
        return _cached_adaptive(input.shape, rank, output_size)
    except TypeError:  # lists, and sizes that are symbols, which are not hashable
        return _adaptive(input.shape, rank, output_size)


def _adaptive_max_pool(rank: int, input: Tensor, output_size: Any, return_indices: bool) -> Any:
    check_tensor(input)
    placing = _adaptive_place(input, output_size, rank)
    if placing is None:
        fail_as_torch(
            f"adaptive_max_pool{rank}d does not take these arguments",
            getattr(reference, f"adaptive_max_pool{rank}d"),
            input,
            output_size,
        )
    channels_last = arrays.is_channels_last(input, rank)
    if not return_indices:
        return pool_rows.max_pool.first(input, placing, channels_last)
    return _with_indices(input, placing, channels_last)


def _adaptive_avg_pool(rank: int, input: Tensor, output_size: Any) -> Tensor:
    check_tensor(input)
    placing = _adaptive_place(input, output_size, rank)
    if placing is None:
        fail_as_torch(
            f"adaptive_avg_pool{rank}d does not take these arguments",
            getattr(reference, f"adaptive_avg_pool{rank}d"),
            input,
            output_size,
        )
    channels_last = arrays.is_channels_last(input, rank)
    return pool_rows.avg_pool(input, placing, True, None, channels_last)


def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Largest value of each window, of windows that cut ``(N, C, L)`` into an output of this size."""
    return _adaptive_max_pool(1, input, output_size, return_indices)


def adaptive_max_pool1d_with_indices(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """:func:`adaptive_max_pool1d`, and the indices of the maxima; ``return_indices`` is ignored."""
    return _adaptive_max_pool(1, input, output_size, True)


def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Largest value of each window, of windows that cut ``(N, C, H, W)`` into an output of this size."""
    return _adaptive_max_pool(2, input, output_size, return_indices)


def adaptive_max_pool2d_with_indices(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """:func:`adaptive_max_pool2d`, and the indices of the maxima; ``return_indices`` is ignored."""
    return _adaptive_max_pool(2, input, output_size, True)


def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Largest value of each window, of windows that cut ``(N, C, D, H, W)`` into an output of this size."""
    return _adaptive_max_pool(3, input, output_size, return_indices)


def adaptive_max_pool3d_with_indices(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """:func:`adaptive_max_pool3d`, and the indices of the maxima; ``return_indices`` is ignored."""
    return _adaptive_max_pool(3, input, output_size, True)


def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Mean of each window, of windows that cut ``(N, C, L)`` into an output of this size."""
    return _adaptive_avg_pool(1, input, output_size)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Mean of each window, of windows that cut ``(N, C, H, W)`` into an output of this size."""
    return _adaptive_avg_pool(2, input, output_size)


def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """Mean of each window, of windows that cut ``(N, C, D, H, W)`` into an output of this size."""
    return _adaptive_avg_pool(3, input, output_size)


def _max_unpool(
    rank: int, input: Tensor, indices: Tensor, kernel_size: Any, stride: Any, padding: Any, output_size: Any
) -> Tensor:
    check_tensor(input)
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a torch.Tensor, got {type(indices).__name__}")
    theirs = getattr(reference, f"max_unpool{rank}d")
    as_theirs = (
        f"max_unpool{rank}d does not take these arguments",
        theirs,
        input,
        indices,
        kernel_size,
        stride,
        padding,
        output_size,
    )
    sizes = _unpooled_size(input, indices, rank, kernel_size, stride, padding, output_size)
    if sizes is None:
        fail_as_torch(*as_theirs)
    check_same_device(input, indices)
    if not pool_rows.indices_are_valid(indices, sizes):
        extent = "x".join(map(str, sizes))
        fail_as_torch(f"Found an invalid max index: output volumes are of size {extent}", *as_theirs[1:])
    channels_last = arrays.is_channels_last(input, rank)
    return pool_rows.max_unpool(input, indices, sizes, channels_last)


def _unpooled_size(
    input: Tensor, indices: Tensor, rank: int, kernel_size: Any, stride: Any, padding: Any, output_size: Any
) -> tuple | None:
    """Spatial sizes of the output; None where there is none."""
    given = []
    for value in (kernel_size, kernel_size if stride is None else stride, padding):
        values = _per_axis(value, rank)
        if len(values) != rank:
            return None
        given.append(values)
    if input.dim() not in (rank + 1, rank + 2) or indices.shape != input.shape or indices.dtype is not torch.int64:
        return None
    shape = input.shape[-rank - 1 :]
    for size in shape:
        if size == 0:
            return None
    kernel, strides, pads = given
    sizes = tuple(
        (size - 1) * s + k - 2 * pad for size, k, s, pad in zip(shape[1:], kernel, strides, pads, strict=True)
    )
    if output_size is not None:
        wanted = tuple(output_size)[2:] if len(output_size) == rank + 2 else tuple(output_size)
        if len(wanted) != rank:
            return None
        for own, one, s in zip(sizes, wanted, strides, strict=True):
            if not own - s < one < own + s:
                return None
        sizes = wanted
    for size in sizes:
        if size < 1:
            return None
    return sizes


def max_unpool1d(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Tensor:
    """Each value of ``(N, C, L)`` at its index in the output, and 0 elsewhere: the inverse of :func:`max_pool1d`."""
    return _max_unpool(1, input, indices, kernel_size, stride, padding, output_size)


def max_unpool2d(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Tensor:
    """Each value of ``(N, C, H, W)`` at its index in the output, and 0 elsewhere: the inverse of :func:`max_pool2d`."""
    return _max_unpool(2, input, indices, kernel_size, stride, padding, output_size)


def max_unpool3d(
    input: Tensor, indices: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
) -> Tensor:
    """Each value of ``(N, C, D, H, W)`` at its index in the output: the inverse of :func:`max_pool3d`."""
    return _max_unpool(3, input, indices, kernel_size, stride, padding, output_size)
