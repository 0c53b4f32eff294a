"""Fractional max pooling as a stateless pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.fractional_window import FractionalWindow
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_dtype, check_gradient, described
from gpu_layers.ops.dropout import check_call_numbers
from gpu_layers.ops.output import claim_pooled, unbatched
from gpu_layers.ops.pool_arguments import per_axis, spatial_shape
from gpu_layers.reference.fractional_max_pool import fractional_max_pool_indices as indices_of
from gpu_layers.runtime.backend import backend_for

__all__ = [
    "FractionalMaxPoolSaved",
    "fractional_max_pool_backward",
    "fractional_max_pool_forward",
    "fractional_max_pool_indices",
]

_MOST_TAPS = 256


@dataclass(slots=True)
class FractionalMaxPoolSaved:
    """What backward needs.

    Attributes
    ----------
    argmax : array of uint8
        Shape of the (batched) output: number of the tap that won.
    starts : array of int32, shape (samples * channels, sum of the output sizes)
        First input of each window, axis after axis.
    window : FractionalWindow
    output_shape : tuple of int
    dtype : numpy.dtype
    channels_last, batched : bool
    """

    argmax: Array
    starts: Array
    window: FractionalWindow
    output_shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool
    batched: bool


def fractional_max_pool_forward(
    x: Array,
    kernel_size: Sequence[int],
    output_size: Sequence[int],
    seed: int | None = None,
    offset: int | None = None,
    *,
    samples: Array = None,
    rng_state: Array = None,
    channels_last: bool = False,
    out: Array = None,
) -> tuple[Array, FractionalMaxPoolSaved]:
    """Largest value of each window, of windows whose starts are drawn (Graham, 2014).

    With u in [0, 1), ``alpha = (input - kernel) / (output - 1)``: window i of an axis starts at
    ``floor((i + u) * alpha) - floor(u * alpha)``, and the last one ends with the input. Each plane has numbers u of its
    own, one per axis.

    Parameters
    ----------
    x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing
        float16, bfloat16, float32 or float64; two or three spatial axes.
    kernel_size, output_size : tuple of int
        One per spatial axis; ``output + kernel - 1`` is at most the input's size.
    seed, offset : int, optional
        Where there are no samples: number g of u, counted in C order over (N, C, axes), has the upper 24 bits of word
        ``g & 3`` of the Philox block ``g >> 2`` of this call, times ``2**-24``.
    samples : array, shape (N, C, axes), optional
        The numbers u, as PyTorch's ``_random_samples``: of two the first is that of the width. float64 for float64
        input, float32 for all others.
    rng_state : array of uint64, shape (3,), optional
        As of :func:`dropout_forward`.
    channels_last : bool
    out : array, optional
        Where to write y; apart from x.

    Returns
    -------
    y : array
        As of :func:`max_pool_forward`: the first of equal maxima wins, or the last of several NaNs.
    saved : FractionalMaxPoolSaved
        One byte per output, and the windows' starts; :func:`fractional_max_pool_indices` decodes it.

    Raises
    ------
    TypeError
        For a wrong array type, dtype or number type, or neither samples nor a seed and an offset.
    ValueError
        For a wrong rank or shape, windows that do not fit, more than 256 taps, or numbers out of range.
    """
    backend = backend_for(x, optional=(samples, rng_state, out))
    batched, window = _checked((x, samples), kernel_size, output_size, channels_last)
    if samples is None:
        seed, offset = check_call_numbers(seed, offset, rng_state)
    elif seed is not None or offset is not None or rng_state is not None:
        raise ValueError("samples were given: leave seed, offset and rng_state away")
    else:
        seed = offset = 0
    channels_last = bool(channels_last)
    target = None if out is None else claim_pooled(out, window.spatial_output, batched, channels_last, x)
    y, argmax, starts = backend.fractional_max_pool_forward(
        x if batched else x[None], window, samples, seed, offset, rng_state, channels_last, target
    )
    if not batched:
        y = unbatched(y, out)
    return y, FractionalMaxPoolSaved(argmax, starts, window, y.shape, x.dtype, channels_last, batched)


def fractional_max_pool_backward(dy: Array, saved: FractionalMaxPoolSaved, *, out: Array = None) -> Array:
    """Send each gradient to the element that won its window; where windows overlap, in the order of the outputs.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : FractionalMaxPoolSaved
    out : array, optional
        Where to write the result; apart from dy.

    Returns
    -------
    array
        Shape and dtype of x. The same bits in every run: no atomics.

    Raises
    ------
    TypeError, ValueError
        Unless dy has y's dtype and shape, and out, if there is one, x's.
    """
    backend = backend_for(dy, saved.argmax, optional=(out,))
    check_gradient(dy, saved.output_shape, saved.dtype)
    window, batched, last = saved.window, saved.batched, saved.channels_last
    target = None if out is None else claim_pooled(out, window.spatial_input, batched, last, dy)
    batch = dy if batched else dy[None]
    dx = backend.fractional_max_pool_backward(batch, saved.argmax, saved.starts, window, last, target)
    return dx if batched else unbatched(dx, out)


def fractional_max_pool_indices(saved: FractionalMaxPoolSaved) -> Array:
    """Flat index in the input plane of each maximum, as PyTorch's ``return_indices=True`` gives it.

    Parameters
    ----------
    saved : FractionalMaxPoolSaved

    Returns
    -------
    array of int64
        y's shape.

    Raises
    ------
    TypeError
        If the current backend does not take the arrays of saved.
    """
    backend_for(saved.argmax)
    with place_of(saved.argmax):
        indices = indices_of(saved.argmax, saved.starts, saved.window, saved.channels_last, array_module(saved.argmax))
    return indices if saved.batched else indices[0]


@Checked
def _checked(
    arrays: tuple[Array, Array], kernel_size: Sequence[int], output_size: Sequence[int], channels_last: bool
) -> tuple[bool, FractionalWindow]:
    """Whether x is batched, and the windows."""
    x, samples = arrays
    check_dtype(x)
    for name, sizes in (("kernel_size", kernel_size), ("output_size", output_size)):
        if not isinstance(sizes, (tuple, list)):
            raise TypeError(f"{name} must be a tuple, one int a spatial axis, got {type(sizes).__name__}")
    rank = len(kernel_size)
    if rank not in (2, 3):
        raise ValueError(f"kernel_size must have 2 or 3 elements, one a spatial axis, got {rank}")
    kernel, outputs = per_axis(kernel_size, rank, "kernel_size"), per_axis(output_size, rank, "output_size")
    batched, spatial = spatial_shape(x, rank, channels_last)
    for name, sizes in (("kernel_size", kernel), ("output_size", outputs)):
        if min(sizes) < 1:
            raise ValueError(f"{name} should be greater than zero, got {list(sizes)}")
    for k, count, size in zip(kernel, outputs, spatial, strict=True):
        if count + k - 1 > size:
            raise ValueError(f"pool size {k} is too large relative to the input size {size} for {count} outputs")
    depth = (1,) * (3 - rank)
    window = FractionalWindow((*depth, *kernel), (*depth, *spatial), (*depth, *outputs), rank)  # type: ignore[arg-type]
    if window.taps > _MOST_TAPS:
        raise ValueError(f"windows of at most {_MOST_TAPS} elements are taken, got {list(kernel)}")
    lead = x.shape[:1] if batched else (1,)
    channels = x.shape[-1] if channels_last else x.shape[-rank - 1]
    if samples is not None:
        wanted, dtype = (*lead, channels, rank), accumulation_dtype(x.dtype)
        if samples.dtype != dtype:
            raise TypeError(f"samples must be {dtype} for {x.dtype} input, got {described(samples.dtype)}")
        if samples.shape not in (wanted, wanted if batched else wanted[1:]):
            raise ValueError(f"samples must have the shape {list(wanted)}, got {list(samples.shape)}")
    return batched, window
