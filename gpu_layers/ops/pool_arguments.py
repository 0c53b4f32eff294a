"""Arguments of the pooling operations: checked, and made into a window. Messages are PyTorch's where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.core.checks import check_integer
from gpu_layers.core.window import Sides, Sizes, Window, adaptive_window, same_padding, sliding_window
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_dtype
from gpu_layers.ops.lengths import sample_lengths
from gpu_layers.runtime.kernel import INTEGER_DTYPES

#: An int, one for each axis, a (before, after) pair for each axis, "same_upper" or "same_lower".
#: One for all spatial axes, or one for each.
PerAxis = int | Sequence[int]
OutputSize = int | Sequence[int | None] | None
Padding = int | Sequence[int] | Sequence[Sequence[int]] | str
_SAME = ("same_upper", "same_lower")
_INT32 = (-(2**31), 2**31 - 1)


def per_axis(value: int | Sequence[int], rank: int, name: str) -> Sizes:
    """One integer a spatial axis.

    Parameters
    ----------
    value : int or sequence of int
        One for all axes (also alone in a sequence, as in PyTorch), or one for each axis.
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
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = values * rank if len(values) == 1 else values
    if len(values) != rank:
        raise ValueError(f"{name} must be an int, or {rank} of them, one a spatial axis, got {value}")
    return tuple(check_integer(v, name, *_INT32) for v in values)


def check_window(kernel: Sizes, stride: Sizes, padding: Padding, dilation: Sizes) -> Sides | str:
    """The padding of each side, or the name of the rule for it.

    Raises
    ------
    TypeError, ValueError
        Unless every number of the window is one that PyTorch takes, in its words. Integers pad by at most half of the
        effective kernel size; pairs by less than all of it.
    """
    for name, sizes in (("kernel size", kernel), ("stride", stride), ("dilation", dilation)):
        if min(sizes) < 1:
            raise ValueError(f"{name} should be greater than zero, but got {name}={list(sizes)}")
    if isinstance(padding, str) and padding in _SAME:
        return padding
    return _sides(kernel, padding, dilation)


def _sides(kernel: Sizes, padding: Padding, dilation: Sizes) -> Sides:
    in_pairs = isinstance(padding, (tuple, list)) and any(isinstance(item, (tuple, list)) for item in padding)
    sides = _pairs(padding, len(kernel)) if in_pairs else _both(padding, len(kernel))
    lowest = min(min(pair) for pair in sides)
    if lowest < 0:
        raise ValueError(f"pad must be non-negative, but got pad: {lowest}")
    for k, pair, d in zip(kernel, sides, dilation, strict=True):
        pad, effective = max(pair), d * (k - 1) + 1
        numbers = f"but got pad={pad}, kernel_size={k} and dilation={d}"
        if not in_pairs and pad > effective // 2:
            raise ValueError(f"pad should be at most half of effective kernel size, {numbers}")
        if pad >= effective:
            raise ValueError(f"pad should be smaller than the effective kernel size, {numbers}")
    return sides


def _both(padding: Any, rank: int) -> Sides:
    if isinstance(padding, str):
        kinds = 'integers, (before, after) pairs, "same_upper" or "same_lower"'
        raise TypeError(f"padding must be an integer, got str {padding!r}: give {kinds}")
    return tuple((pad, pad) for pad in per_axis(padding, rank, "padding"))


def _pairs(padding: Any, rank: int) -> Sides:
    if len(padding) != rank or any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in padding):
        raise ValueError(f"padding must be {rank} (before, after) pairs, one a spatial axis, got {padding}")
    before, after = zip(*(per_axis(pair, 2, "padding") for pair in padding), strict=True)
    return tuple(zip(before, after, strict=True))


def _check_dtype(x: Array, takes_integers: bool) -> None:
    if not (takes_integers and (x.dtype == np.bool_ or x.dtype in INTEGER_DTYPES)):
        check_dtype(x)


@Checked
def place_window(
    x: Array,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None,
    padding: Padding,
    dilation: int | Sequence[int],
    ceil_mode: bool,
    channels_last: bool,
    takes_integers: bool = False,
) -> tuple[bool, Window]:
    """Whether x is batched, and the window over its spatial axes.

    Raises
    ------
    TypeError, ValueError
        For another dtype than the four (or integers and bool, if they are taken), numbers that make no window, a wrong
        rank, an empty channel or spatial axis, or a window that does not fit.
    """
    _check_dtype(x, takes_integers)
    if not isinstance(kernel_size, (tuple, list)):
        raise TypeError(f"kernel_size must be a tuple, one int a spatial axis, got {type(kernel_size).__name__}")
    rank = len(kernel_size)
    if rank not in (1, 2, 3):
        raise ValueError(f"kernel_size must have 1 to 3 elements, one a spatial axis, got {len(kernel_size)}")
    kernel = per_axis(kernel_size, rank, "kernel_size")
    strides = kernel if stride is None else per_axis(stride, rank, "stride")
    dilations = per_axis(dilation, rank, "dilation")
    sides = check_window(kernel, strides, padding, dilations)
    batched, spatial = spatial_shape(x, rank, channels_last)
    ceil = bool(ceil_mode)
    if isinstance(sides, str):
        sides, ceil = same_padding(kernel, strides, dilations, spatial, sides == "same_upper"), False
    before, after = tuple(pair[0] for pair in sides), tuple(pair[1] for pair in sides)
    return batched, sliding_window(kernel, strides, dilations, before, after, ceil, spatial)


@Checked
def place_adaptive_window(
    x: Array, output_size: Sequence[int | None], channels_last: bool, takes_integers: bool = False
) -> tuple[bool, Window]:
    """Whether x is batched, and the windows that give it this output size.

    Raises
    ------
    TypeError, ValueError
        For sizes that are not valid, a wrong rank, or an empty channel or spatial axis.
    """
    _check_dtype(x, takes_integers)
    if not isinstance(output_size, (tuple, list)):
        raise TypeError(f"output_size must be a tuple, one int a spatial axis, got {type(output_size).__name__}")
    rank = len(output_size)
    if rank not in (1, 2, 3):
        raise ValueError(f"output_size must have 1 to 3 elements, one a spatial axis, got {rank}")
    sizes = check_output_size(output_size, rank)
    batched, spatial = spatial_shape(x, rank, channels_last)
    outputs = tuple(own if size is None else size for size, own in zip(sizes, spatial, strict=True))
    return batched, adaptive_window(outputs, spatial)


def check_output_size(output_size: OutputSize, rank: int) -> tuple[int | None, ...]:
    """One output size a spatial axis; None keeps the input's.

    Raises
    ------
    TypeError, ValueError
        For sizes that are not valid.
    """
    values = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,) * rank
    if len(values) != rank:
        raise ValueError(
            f"output_size must be an int or None, or {rank} of them, one a spatial axis, got {output_size}"
        )
    sizes = tuple(None if v is None else check_integer(v, "output_size", *_INT32) for v in values)
    if any(size is not None and size < 0 for size in sizes):
        raise ValueError(f"elements of output_size must be greater than or equal to 0 but received {list(sizes)}")
    return sizes


def spatial_shape(x: Array, rank: int, channels_last: bool) -> tuple[bool, Sizes]:
    """Whether x is batched, and the sizes of its spatial axes.

    Raises
    ------
    ValueError
        For a wrong rank, or an empty channel or spatial axis.
    """
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
    return batched, tuple(spatial)


def check_taps(window: Window) -> None:
    """ValueError for a window with more elements than 32 bits can number: the winner could not be saved."""
    if window.taps > 2**32:
        raise ValueError(
            f"kernel_size must have at most {2**32} elements, as the largest is saved by a number of 32 bits, "
            f"got {window.taps}: kernel_size={list(window.kernel)}"
        )


def check_lengths(lengths: ArrayLike | None, x: Array, batched: bool, window: Window) -> Array:
    """The size of each sample, or None; see :func:`sample_lengths`."""
    return None if lengths is None else sample_lengths(lengths, x, batched, window.input_shape)
