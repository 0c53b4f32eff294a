"""Average pooling as a stateless pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.core.checks import check_integer
from gpu_layers.core.window import Window
from gpu_layers.ops.checks import check_gradient
from gpu_layers.ops.output import claim_pooled, unbatched
from gpu_layers.ops.pool_arguments import Padding, check_lengths, place_adaptive_window, place_window
from gpu_layers.runtime.backend import backend_for

__all__ = ["AvgPoolSaved", "adaptive_avg_pool_forward", "avg_pool_backward", "avg_pool_forward"]


@dataclass(slots=True)
class AvgPoolSaved:
    """What backward needs: shapes only.

    Attributes
    ----------
    window : Window
    output_shape : tuple of int
    dtype : numpy.dtype
    channels_last, batched, count_include_pad : bool
    divisor_override : int or None
    lengths : array of int64, or None
        A copy, (samples, spatial axes).
    """

    window: Window
    output_shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool
    batched: bool
    count_include_pad: bool
    divisor_override: int | None
    lengths: Array = None


def check_divisor(divisor_override: object) -> int | None:
    """A divisor, or None. TypeError unless it is an integer, ValueError for 0."""
    if divisor_override is None:
        return None
    divisor = check_integer(divisor_override, "divisor_override", -(2**31), 2**31 - 1)
    if divisor == 0:
        raise ValueError("divisor must be not zero")
    return divisor


def avg_pool_forward(
    x: Array,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    channels_last: bool = False,
    lengths: ArrayLike | None = None,
    out: Array = None,
) -> tuple[Array, AvgPoolSaved]:
    """Mean of each window.

    The sum is divided by ``divisor_override``, if given. Otherwise it is divided by the number of the window's elements
    within the padded extent, if ``count_include_pad``, else by the number of those inside the input.

    Parameters
    ----------
    x, kernel_size, stride, padding, dilation, ceil_mode, channels_last
        As in :func:`max_pool_forward`.
    count_include_pad : bool
    divisor_override : int, optional
        Not 0.
    lengths : array_like of int, shape (N, spatial axes), or (N,) for one axis; optional
        Size of each sample of a padded batch; padding lies around it. Elements beyond count neither in the sum nor in
        the divisor, and get no gradient.
    out : array, optional
        Where to write y; must not overlap x.

    Returns
    -------
    y : array
        x's dtype; half types are summed in float32.
    saved : AvgPoolSaved
        For :func:`avg_pool_backward`; it holds shapes only.

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool_forward`; ValueError for a zero divisor.
    """
    backend = backend_for(x, optional=(out,))
    divisor = check_divisor(divisor_override)
    batched, window = place_window(x, kernel_size, stride, padding, dilation, ceil_mode, channels_last)
    own = check_lengths(lengths, x, batched, window)
    return _forward(backend, x, batched, window, channels_last, bool(count_include_pad), divisor, own, out)


def adaptive_avg_pool_forward(
    x: Array, output_size: Sequence[int | None], *, channels_last: bool = False, out: Array = None
) -> tuple[Array, AvgPoolSaved]:
    """Mean of each window; the windows follow from the output's size.

    Parameters
    ----------
    x, output_size, channels_last, out
        As in :func:`adaptive_max_pool_forward`.

    Returns
    -------
    y : array
    saved : AvgPoolSaved
        For :func:`avg_pool_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool_forward`.
    """
    backend = backend_for(x, optional=(out,))
    batched, window = place_adaptive_window(x, output_size, channels_last)
    return _forward(backend, x, batched, window, channels_last, True, None, None, out)


def _forward(
    backend: ModuleType,
    x: Array,
    batched: bool,
    window: Window,
    channels_last: bool,
    count_include_pad: bool,
    divisor: int | None,
    lengths: ArrayLike | None,
    out: Array,
) -> tuple[Array, AvgPoolSaved]:
    target = None if out is None else claim_pooled(out, window.output_shape, batched, channels_last, x)
    batch = x if batched else x[None]
    y = backend.avg_pool_forward(batch, window, channels_last, count_include_pad, divisor, lengths, target)
    if not batched:
        y = unbatched(y, out)
    return y, AvgPoolSaved(window, y.shape, x.dtype, channels_last, batched, count_include_pad, divisor, lengths)


def avg_pool_backward(dy: Array, saved: AvgPoolSaved, *, out: Array = None) -> Array:
    """Spread each gradient evenly over its window's elements inside the input.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : AvgPoolSaved
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
    backend = backend_for(dy, optional=(out,))
    check_gradient(dy, saved.output_shape, saved.dtype)
    window, batched, last = saved.window, saved.batched, saved.channels_last
    target = None if out is None else claim_pooled(out, window.input_shape, batched, last, dy)
    divisor, batch = (saved.count_include_pad, saved.divisor_override), dy if batched else dy[None]
    dx = backend.avg_pool_backward(batch, window, last, *divisor, saved.lengths, target)
    return dx if batched else unbatched(dx, out)
