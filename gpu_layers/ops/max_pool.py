"""Max pooling as a stateless pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.core.cuda import place_of
from gpu_layers.core.window import Window
from gpu_layers.ops.checks import check_gradient, described
from gpu_layers.ops.output import claim_pooled, output_shape, unbatched
from gpu_layers.ops.pool_arguments import Padding, check_lengths, check_taps, place_adaptive_window, place_window
from gpu_layers.runtime.backend import backend_for

__all__ = [
    "MaxPoolSaved",
    "adaptive_max_pool_forward",
    "max_pool_backward",
    "max_pool_forward",
    "max_pool_gather",
    "max_pool_indices",
]


@dataclass(slots=True)
class MaxPoolSaved:
    """What backward needs.

    Attributes
    ----------
    argmax : array of uint8 (uint16, uint32 for windows of more than 256, 65,536 elements)
        Shape of the (batched) output: number of the winning element within its window.
    window : Window
    output_shape : tuple of int
    dtype : numpy.dtype
    channels_last, batched : bool
    lengths : array of int64, or None
        A copy, (samples, spatial axes).
    """

    argmax: Array
    window: Window
    output_shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool
    batched: bool
    lengths: Array = None


def max_pool_forward(
    x: Array,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    channels_last: bool = False,
    lengths: ArrayLike | None = None,
    out: Array = None,
) -> tuple[Array, MaxPoolSaved]:
    """Largest value of each window.

    Padding is never chosen. The first of equal maxima wins, in the order of the window's elements, last axis fastest.
    NaN propagates; the last of several NaNs is kept.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing
        float16, bfloat16, float32 or float64; or integers of 8 to 64 bits or bool, which have values and indices, but
        no gradient.
    kernel_size : tuple of int
        One for each spatial axis.
    stride : int or tuple of int, optional
        kernel_size by default.
    padding : int, tuple of int, tuple of (before, after), "same_upper" or "same_lower"
        Integers: at most half the effective kernel size. Pairs: at most the effective kernel size minus one.
        "same_upper" and "same_lower": as much as makes ``ceil(input / stride)`` outputs; an odd element goes to the end
        or to the start.
    dilation : int or tuple of int
    ceil_mode : bool
        Round the output size up; the last window still starts inside the input or its leading padding.
    channels_last : bool
    lengths : array_like of int, shape (N, spatial axes), or (N,) for one axis; optional
        Size of each sample of a padded batch. Elements beyond do not count and get no gradient; a window without any
        element that counts gives 0.
    out : array, optional
        Where to write y; must not overlap x.

    Returns
    -------
    y : array
        x's dtype.
    saved : MaxPoolSaved
        For :func:`max_pool_backward`. It keeps one byte per output for windows of at most 256 elements, which
        :func:`max_pool_indices` decodes.

    Raises
    ------
    TypeError
        For a wrong array type, dtype or number type.
    ValueError
        For a wrong rank, an empty channel or spatial axis, a window that does not fit, or one of more than 2**32
        elements.
    """
    backend = backend_for(x, optional=(out,))
    batched, window = place_window(x, kernel_size, stride, padding, dilation, ceil_mode, channels_last, True)
    return _forward(backend, x, batched, window, channels_last, check_lengths(lengths, x, batched, window), out)


def adaptive_max_pool_forward(
    x: Array, output_size: Sequence[int | None], *, channels_last: bool = False, out: Array = None
) -> tuple[Array, MaxPoolSaved]:
    """Largest value of each window; the windows follow from the output's size.

    Window i of an axis of L inputs and o outputs is ``floor(i L / o) .. ceil((i + 1) L / o) - 1``.

    Parameters
    ----------
    x, channels_last, out
        As in :func:`max_pool_forward`.
    output_size : tuple of int or None
        One for each spatial axis; None keeps the input's size.

    Returns
    -------
    y : array
    saved : MaxPoolSaved
        For :func:`max_pool_backward` and :func:`max_pool_indices`.

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool_forward`.
    """
    backend = backend_for(x, optional=(out,))
    batched, window = place_adaptive_window(x, output_size, channels_last, True)
    return _forward(backend, x, batched, window, channels_last, None, out)


def _forward(
    backend: ModuleType,
    x: Array,
    batched: bool,
    window: Window,
    channels_last: bool,
    lengths: ArrayLike | None,
    out: Array,
) -> tuple[Array, MaxPoolSaved]:
    check_taps(window)
    if x.dtype.kind == "b":
        # False and True are 0 and 1, byte by byte.
        bytes_of, into = x.view(np.uint8), None if out is None else _bytes_of(out)
        y, saved = _forward(backend, bytes_of, batched, window, channels_last, lengths, into)
        return y.view(np.bool_) if out is None else out, replace(saved, dtype=x.dtype)
    target = None if out is None else claim_pooled(out, window.output_shape, batched, channels_last, x)
    y, argmax = backend.max_pool_forward(x if batched else x[None], window, channels_last, lengths, target)
    if not batched:
        y = unbatched(y, out)
    return y, MaxPoolSaved(argmax, window, y.shape, x.dtype, channels_last, batched, lengths)


def _bytes_of(out: Array) -> Array:
    """An array of bool as bytes; another one as it is, which is then refused."""
    return out.view(np.uint8) if out.dtype.kind == "b" else out


def max_pool_backward(dy: Array, saved: MaxPoolSaved, *, out: Array = None) -> Array:
    """Send each gradient to the element that won its window. The sum of gradients is preserved.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : MaxPoolSaved
    out : array, optional
        Where to write the result; must not overlap dy.

    Returns
    -------
    array
        Shape and dtype of x.

    Raises
    ------
    TypeError
        If dy has another array type or dtype than y.
    ValueError
        If dy has another shape than y, or out cannot take the result.
    """
    backend = backend_for(dy, saved.argmax, optional=(out,))
    if saved.dtype.kind in "biu":
        raise TypeError(f"max pooling of {saved.dtype} has no gradient")
    check_gradient(dy, saved.output_shape, saved.dtype)
    window, batched, last = saved.window, saved.batched, saved.channels_last
    target = None if out is None else claim_pooled(out, window.input_shape, batched, last, dy)
    batch = dy if batched else dy[None]
    dx = backend.max_pool_backward(batch, saved.argmax, window, last, saved.lengths, target)
    return dx if batched else unbatched(dx, out)


def max_pool_gather(x: Array, saved: MaxPoolSaved, *, out: Array = None) -> Array:
    """For each window, the element of another array that a forward chose.

    It is linear in x and the transpose of :func:`max_pool_backward`: the backward of that, and the derivative of
    :func:`max_pool_forward` in the direction x.

    Parameters
    ----------
    x : array
        Shape and dtype of the forward's input.
    saved : MaxPoolSaved
    out : array, optional
        Where to write the result; must not overlap x.

    Returns
    -------
    array
        Shape of the forward's y; +0 for a window without any element that counts.

    Raises
    ------
    TypeError, ValueError
        If x has another array type, dtype or shape than the forward's input, or out cannot take the result.
    """
    backend = backend_for(x, saved.argmax, optional=(out,))
    shape = output_shape(saved.argmax, saved.window.input_shape, True, saved.channels_last)
    shape = shape if saved.batched else shape[1:]
    if x.dtype != saved.dtype:
        raise TypeError(f"x must have the input's dtype {saved.dtype}, got {described(x.dtype)}")
    if x.shape != shape:
        raise ValueError(f"x must have the input's shape {list(shape)}, got {list(x.shape)}")
    window, batched, last = saved.window, saved.batched, saved.channels_last
    target = None if out is None else claim_pooled(out, window.output_shape, batched, last, x)
    batch = x if batched else x[None]
    y = backend.max_pool_gather(batch, saved.argmax, window, last, saved.lengths, target)
    return y if batched else unbatched(y, out)


def max_pool_indices(saved: MaxPoolSaved) -> Array:
    """Flat index in the input plane of each maximum, as PyTorch's ``return_indices=True`` gives it.

    Parameters
    ----------
    saved : MaxPoolSaved

    Returns
    -------
    array of int64
        y's shape; -1 for a window without any element that counts.

    Raises
    ------
    TypeError
        If a forced backend does not take the saved array.
    """
    backend = backend_for(saved.argmax)
    with place_of(saved.argmax):
        indices = backend.max_pool_indices(saved.argmax, saved.window, saved.channels_last, saved.lengths)
    return indices if saved.batched else indices[0]
