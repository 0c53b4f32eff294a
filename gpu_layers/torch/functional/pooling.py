"""Functions of the poolings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as reference

from gpu_layers.torch import arrays
from gpu_layers.torch.checks import check_same_device, check_tensor, fail_as_torch
from gpu_layers.torch.ops import pooling as pool_rows
from gpu_layers.torch.ops.pooling import Placing
from gpu_layers.torch.registry import is_eager

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


#: One number for all spatial axes, or one for each.
Sizes: TypeAlias = int | Sequence[int]
#: Likewise, of adaptive pooling: None for the input's.
Outputs: TypeAlias = int | Sequence[int | None] | None
#: With the indices of the maxima, if they are asked for.
Pooled: TypeAlias = Tensor | tuple[Tensor, Tensor]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_IMAGES = "``(N, C, L)`` or ``(C, L)``", "``(N, C, H, W)`` or ``(C, H, W)``", "``(N, C, D, H, W)`` or ``(C, D, H, W)``"


def _of_rank(rank: int, function: Callable[Concatenate[int, _Arguments], _Result]) -> Callable[_Arguments, _Result]:
    """A function of any number of spatial axes, as torch's for so many: with its own name, signature and docstring."""

    def of_rank(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return function(rank, *args, **kwargs)

    of_rank.__name__ = of_rank.__qualname__ = function.__name__.replace("pool", f"pool{rank}d")
    of_rank.__doc__ = (function.__doc__ or "").replace("pool`", f"pool{rank}d`").replace("images", _IMAGES[rank - 1])
    signature = inspect.signature(function)
    arguments = list(signature.parameters.values())[1:]
    of_rank.__signature__ = signature.replace(parameters=arguments)  # type: ignore[attr-defined]
    return of_rank


# A size may be a symbol in a compiled graph.
_NUMBERS = (int, torch.SymInt, np.integer)


def _per_axis(value: Any, rank: int) -> tuple:
    """One number per spatial axis, from one for all or as many as were given."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * rank if len(values) == 1 else values


def _numbers(kernel_size: Sizes, stride: Sizes | None, padding: Sizes, dilation: Sizes, rank: int) -> tuple | None:
    """Kernel, stride, padding and dilation, one per spatial axis; None where they make no window."""
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        stride = kernel_size
    found = []
    for value in (kernel_size, stride, padding, dilation):
        values = _per_axis(value, rank)
        if len(values) != rank:
            return None
        for one in values:
            if not isinstance(one, _NUMBERS) or isinstance(one, bool):
                return None
        found.append(tuple([int(one) if isinstance(one, np.integer) else one for one in values]))
    kernel, strides, pads, dilations = found
    for k, s, pad, d in zip(kernel, strides, pads, dilations, strict=True):
        # Dilated or not, torch goes by the kernel's own size.
        if k < 1 or s < 1 or d < 1 or pad < 0 or 2 * pad > k:
            return None
    return kernel, strides, pads, dilations


def _fits(shape: Sequence[int], rank: int, window: tuple | None, ceil_mode: bool) -> bool:
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
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    rank: int,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    dilation: Sizes,
    ceil_mode: bool,
    *options: float | None,
) -> Placing | None:
    """A window over an input of this shape and these strides; None where it is none, or does not fit."""
    window = _numbers(kernel_size, stride, padding, dilation, rank)
    if window is None or type(ceil_mode) is not bool or dtype not in arrays.FLOAT_DTYPES:
        return None
    if not _fits(shape, rank, window, ceil_mode):
        return None
    return _placing(shape, strides, rank, (*window, ceil_mode, ()), options)


def _placing(shape: Sequence[int], strides: Sequence[int], rank: int, numbers: tuple, options: tuple) -> Placing:
    channels_last = len(shape) == rank + 2 and arrays.is_channels_last(shape, strides)
    return Placing(shape[:-rank], shape[-rank:], numbers, (*options, channels_last))


def _placed_averages(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    rank: int,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Placing | None:
    """As :func:`_placed`, of averages."""
    if type(count_include_pad) is not bool or divisor_override == 0:
        return None
    if divisor_override is not None:
        if not isinstance(divisor_override, _NUMBERS):
            return None
        divisor_override = int(divisor_override)
    window = rank, kernel_size, stride, padding, 1, ceil_mode
    placing = _placed(shape, strides, dtype, *window, count_include_pad, divisor_override)
    return placing if placing is None or rank < 3 or _are_covered(placing) else None


def _are_covered(placing: Placing) -> bool:
    """Whether the image is at least as large as a window, which torch requires of averages over three axes."""
    return all(size >= k for size, k in zip(placing.spatial, placing.numbers[0], strict=True))


# For plain tensors; what does not fit is looked at again, with others.
_remembered = lru_cache(maxsize=4096, typed=True)
_kept = _remembered(_placed)
_kept_averages = _remembered(_placed_averages)
# Nested tensors have no shape, and lists are not hashable.
_NOT_KEPT = (RuntimeError, TypeError)
_DENSE = torch.strided


def max_pool(
    rank: int,
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pooled:
    """Largest value of each window of images."""
    if not return_indices and is_eager(input) and input.layout is _DENSE:
        try:
            placing = _kept(
                input.shape, input.stride(), input.dtype, rank, kernel_size, stride, padding, dilation, ceil_mode, False
            )
        except _NOT_KEPT:
            placing = None
        if placing is not None:
            return pool_rows.max_pool.first.eagerly(input, placing)
    check_tensor(input)
    window = rank, kernel_size, stride, padding, dilation, ceil_mode
    placed = partial(_placed, input.shape, input.stride(), input.dtype)
    placing = placed(*window, False)
    if placing is None:
        placing = _taken_by_torch(
            placed,
            (*window, False),
            getattr(reference, f"max_pool{rank}d"),
            input,
            kernel_size,
            stride,
            padding,
            dilation,
            ceil_mode=ceil_mode,
            return_indices=return_indices,
        )
    return _with_indices(input, placing) if return_indices else pool_rows.max_pool.first(input, placing)


def _taken_by_torch(
    placed: Callable[..., Placing | None], given: tuple, theirs: Callable[..., Any], *args: Any, **kwargs: Any
) -> Placing:
    """The window of arguments of other types that torch takes too, as tensors of one number; else torch's error."""
    with torch.no_grad():
        theirs(*args, **kwargs)
    placing = placed(*map(_plain, given))
    if placing is None:
        raise ValueError(f"{theirs.__name__} does not take these arguments")
    return placing


def _plain(value: Any) -> Any:
    """Integers and tuples of them, where they are in tensors, arrays or ranges."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
        return int(value) if isinstance(value, bool) else _plain(value)
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list, range)) else value


def _with_indices(input: Tensor, placing: Placing) -> tuple[Tensor, Tensor]:
    y, argmax = pool_rows.max_pool(input, placing)
    return y, pool_rows.max_pool_indices(argmax, placing)


def max_pool_with_indices(
    rank: int,
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Pooled:
    """:func:`max_pool`, and the indices of the maxima; ``return_indices`` is ignored."""
    return max_pool(rank, input, kernel_size, stride, padding, dilation, ceil_mode, True)


max_pool1d, max_pool1d_with_indices = _of_rank(1, max_pool), _of_rank(1, max_pool_with_indices)
max_pool2d, max_pool2d_with_indices = _of_rank(2, max_pool), _of_rank(2, max_pool_with_indices)
max_pool3d, max_pool3d_with_indices = _of_rank(3, max_pool), _of_rank(3, max_pool_with_indices)


def avg_pool(
    rank: int,
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean of each window of images."""
    window = rank, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    if is_eager(input) and input.layout is _DENSE:
        try:
            placing = _kept_averages(input.shape, input.stride(), input.dtype, *window)
        except _NOT_KEPT:
            placing = None
        if placing is not None:
            return pool_rows.avg_pool.eagerly(input, placing)
    check_tensor(input)
    placed = partial(_placed_averages, input.shape, input.stride(), input.dtype)
    placing = placed(*window)
    if placing is None:
        theirs = getattr(reference, f"avg_pool{rank}d")
        given = (kernel_size, () if stride is None else stride, padding, ceil_mode, count_include_pad)
        divisor = () if rank == 1 else (divisor_override,)
        placing = _taken_by_torch(placed, window, theirs, input, *given, *divisor)
    return pool_rows.avg_pool(input, placing)


def avg_pool1d(
    input: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Mean of each window of ``(N, C, L)`` or ``(C, L)``."""
    return avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


avg_pool2d, avg_pool3d = _of_rank(2, avg_pool), _of_rank(3, avg_pool)


def lp_pool(
    rank: int,
    input: Tensor,
    norm_type: float,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """``(sum |x|^p)^(1/p)`` of each window of images; torch's for x >= 0."""
    check_tensor(input)
    try:
        p = float(norm_type)
    except (TypeError, ValueError):
        p = 0.0  # which torch refuses too
    window = rank, kernel_size, stride, 0, 1, ceil_mode
    placed = partial(_placed, input.shape, input.stride(), input.dtype)
    placing = placed(*window, p)
    if placing is None or p == 0.0 or not (rank < 3 or _are_covered(placing)):
        placing = _taken_by_torch(
            placed,
            (*window, p),
            getattr(reference, f"lp_pool{rank}d"),
            input,
            norm_type,
            kernel_size,
            stride,
            ceil_mode,
        )
    # Compared, not math.isinf: a compiled graph may hold a symbol for the number.
    if p == math.inf or p == -math.inf:
        sign = 1 if p > 0 else -1
        return sign * max_pool(rank, sign * input.abs(), kernel_size, stride, 0, 1, ceil_mode, False)
    if not p > 0:
        # No norm, but what torch computes.
        means = avg_pool(rank, input.abs() ** p, kernel_size, stride, 0, ceil_mode, True, None)
        return (means * math.prod(placing.numbers[0])) ** (1 / p)
    return pool_rows.lp_pool(input, placing)


lp_pool1d, lp_pool2d, lp_pool3d = _of_rank(1, lp_pool), _of_rank(2, lp_pool), _of_rank(3, lp_pool)


def _placed_adaptively(
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    rank: int,
    output_size: Outputs,
    *options: float | None,
) -> Placing | None:
    """The windows that cut an input of this shape into an output of this size; None where there are none."""
    if output_size is None:
        return None
    wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * rank
    if len(wanted) != rank or len(shape) not in (rank + 1, rank + 2) or dtype not in arrays.FLOAT_DTYPES:
        return None
    image = shape[-rank - 1 :]
    for size in image:
        if size == 0:
            return None
    if rank == 1 and wanted[0] is None:  # which torch takes of several axes only
        return None
    sizes = tuple(own if size is None else size for size, own in zip(wanted, image[1:], strict=True))
    for size in sizes:
        if not isinstance(size, _NUMBERS) or isinstance(size, bool) or size < 0:
            return None
    sizes = tuple([int(size) if isinstance(size, np.integer) else size for size in sizes])
    return _placing(shape, strides, rank, ((), (), (), (), False, sizes), options)


def _is_known(shape: Sequence[int], rank: int, output_size: Outputs) -> bool:
    """Whether the graph that is made, if any, is for windows of known sizes."""
    if not is_compiling() and not any(isinstance(size, torch.SymInt) for size in shape):
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    outputs = _per_axis(output_size, rank)
    if len(outputs) != rank:
        return True  # which is refused
    return all(
        wanted is None or (has_static_value(size) and has_static_value(wanted))
        for size, wanted in zip(shape[-rank:], outputs, strict=False)
    )


_kept_adaptively = _remembered(_placed_adaptively)


def adaptive_max_pool(rank: int, input: Tensor, output_size: Outputs, return_indices: bool = False) -> Pooled:
    """Largest value of each window, of windows that cut images into an output of this size."""
    if not return_indices and is_eager(input) and input.layout is _DENSE:
        try:
            placing = _kept_adaptively(input.shape, input.stride(), input.dtype, rank, output_size, False)
        except _NOT_KEPT:
            placing = None
        if placing is not None:
            return pool_rows.max_pool.first.eagerly(input, placing)
    check_tensor(input)
    wide = not _is_known(input.shape, rank, output_size)
    placed = partial(_placed_adaptively, input.shape, input.stride(), input.dtype, rank)
    placing = placed(output_size, wide)
    if placing is None:
        placing = _taken_by_torch(
            placed, (output_size, wide), getattr(reference, f"adaptive_max_pool{rank}d"), input, output_size
        )
    return _with_indices(input, placing) if return_indices else pool_rows.max_pool.first(input, placing)


def adaptive_avg_pool(rank: int, input: Tensor, output_size: Outputs) -> Tensor:
    """Mean of each window, of windows that cut images into an output of this size."""
    if is_eager(input) and input.layout is _DENSE:
        try:
            placing = _kept_adaptively(input.shape, input.stride(), input.dtype, rank, output_size, True, None)
        except _NOT_KEPT:
            placing = None
        if placing is not None:
            return pool_rows.avg_pool.eagerly(input, placing)
    check_tensor(input)
    placed = partial(_placed_adaptively, input.shape, input.stride(), input.dtype, rank)
    placing = placed(output_size, True, None)
    if placing is None:
        if rank == 2 and input.dim() == 2 and type(output_size) is int and output_size == 1 and input.numel():
            return input.mean((0, 1), keepdim=True)  # as torch, of a single plane
        placing = _taken_by_torch(
            placed, (output_size, True, None), getattr(reference, f"adaptive_avg_pool{rank}d"), input, output_size
        )
    return pool_rows.avg_pool(input, placing)


def adaptive_max_pool_with_indices(
    rank: int, input: Tensor, output_size: Outputs, return_indices: bool = False
) -> Pooled:
    """:func:`adaptive_max_pool`, and the indices of the maxima; ``return_indices`` is ignored."""
    return adaptive_max_pool(rank, input, output_size, True)


adaptive_max_pool1d, adaptive_avg_pool1d = _of_rank(1, adaptive_max_pool), _of_rank(1, adaptive_avg_pool)
adaptive_max_pool2d, adaptive_avg_pool2d = _of_rank(2, adaptive_max_pool), _of_rank(2, adaptive_avg_pool)
adaptive_max_pool3d, adaptive_avg_pool3d = _of_rank(3, adaptive_max_pool), _of_rank(3, adaptive_avg_pool)
adaptive_max_pool1d_with_indices = _of_rank(1, adaptive_max_pool_with_indices)
adaptive_max_pool2d_with_indices = _of_rank(2, adaptive_max_pool_with_indices)
adaptive_max_pool3d_with_indices = _of_rank(3, adaptive_max_pool_with_indices)


def max_unpool(
    rank: int,
    input: Tensor,
    indices: Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Each value of images at its index in the output, and 0 elsewhere: the inverse of :func:`max_pool`."""
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
    channels_last = len(input.shape) == rank + 2 and arrays.is_channels_last(input.shape, input.stride())
    return pool_rows.max_unpool(input, indices, (sizes, channels_last))


def _unpooled_size(
    input: Tensor,
    indices: Tensor,
    rank: int,
    kernel_size: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    output_size: Sequence[int] | None,
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
    if rank == 3 and min(strides) <= 0:
        return None
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


max_unpool1d, max_unpool2d, max_unpool3d = _of_rank(1, max_unpool), _of_rank(2, max_unpool), _of_rank(3, max_unpool)
