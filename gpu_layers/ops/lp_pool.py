"""Power-average pooling as a stateless pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_number
from gpu_layers.core.window import Window
from gpu_layers.core.writes import check_unwritten, write_count
from gpu_layers.ops.checked import Checked
from gpu_layers.ops.checks import check_gradient
from gpu_layers.ops.output import claim_pooled, unbatched
from gpu_layers.ops.pool_arguments import Padding, check_taps, place_window
from gpu_layers.runtime.backend import backend_for

__all__ = ["LPPoolSaved", "lp_pool_backward", "lp_pool_forward"]


@dataclass(slots=True)
class LPPoolSaved:
    """What backward needs.

    Attributes
    ----------
    x : array
        The (batched) input itself, not a copy: it must keep its values until backward is done. Backward notices what
        this library has written to it.
    argmax : array of unsigned integers, or None
        Shape of the (batched) output. For p = inf: number of the winning element within its window. Else nothing but x
        is kept: backward computes the norms again.
    window : Window
    norm_type : float
    output_shape : tuple of int
    dtype : numpy.dtype
    channels_last, batched : bool
    writes : int
        :func:`write_count` of the forward.
    """

    x: Array
    argmax: Array
    window: Window
    norm_type: float
    output_shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool
    batched: bool
    writes: int = field(default_factory=write_count)


def check_norm_type(norm_type: object) -> float:
    """The p of a norm as a float. TypeError unless it is a number, ValueError unless it is positive."""
    p = check_number(norm_type, "norm_type")
    if not p > 0:
        raise ValueError(f"norm_type must be greater than zero, got {norm_type}")
    return p


def lp_pool_forward(
    x: Array,
    norm_type: float,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    channels_last: bool = False,
    out: Array = None,
) -> tuple[Array, LPPoolSaved]:
    """``(sum |x|^p)^(1/p)`` of each window, as ONNX defines it; PyTorch's for ``x >= 0``.

    In ceil mode a window may reach beyond the padding. Its sum is then multiplied by the number of the kernel's
    elements over that of its elements within the padded extent, as in PyTorch. The largest ``|x|`` is factored out
    before powers are taken, so that they neither overflow nor vanish. For p of at least 1, y and the gradient are
    within 4 half units in the last place.

    Parameters
    ----------
    x, kernel_size, stride, padding, dilation, ceil_mode, channels_last, out
        As in :func:`max_pool_forward`.
    norm_type : float
        p, above 0; inf takes the largest ``|x|``.

    Returns
    -------
    y : array
        x's dtype.
    saved : LPPoolSaved
        For :func:`lp_pool_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool_forward`; ValueError for a p of 0 or less.
    """
    backend = backend_for(x, optional=(out,))
    p, batched, window = _checked(x, norm_type, kernel_size, stride, padding, dilation, ceil_mode, channels_last)
    target = None if out is None else claim_pooled(out, window.output_shape, batched, channels_last, x)
    batch = x if batched else x[None]
    y, argmax = backend.lp_pool_forward(batch, window, p, channels_last, target)
    if not batched:
        y = unbatched(y, out)
    return y, LPPoolSaved(batch, argmax, window, p, y.shape, x.dtype, channels_last, batched)


@Checked
def _checked(x: Array, norm_type: float, *arguments: object) -> tuple[float, bool, Window]:
    """p, whether x is batched, and the window over its spatial axes."""
    p = check_norm_type(norm_type)
    batched, window = place_window(x, *arguments)
    if math.isinf(p):
        check_taps(window)
    return p, batched, window


def lp_pool_backward(dy: Array, saved: LPPoolSaved, *, out: Array = None) -> Array:
    """``sign(x) |x|^(p-1) sum(dy y^(1-p))`` over the windows of each element.

    The y of a window that ceil mode cuts off includes the factor of its sum. Where x is 0 the gradient is 0. For p =
    inf each gradient goes to the first of the largest. x must hold the values that it had in the forward.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : LPPoolSaved
    out : array, optional
        Where to write the result; must not overlap dy or x.

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
    RuntimeError
        If this library has written to x since the forward.
    """
    backend = backend_for(dy, saved.x, optional=(out,))
    check_gradient(dy, saved.output_shape, saved.dtype)
    check_unwritten(saved.writes, x=saved.x)
    window, batched, last = saved.window, saved.batched, saved.channels_last
    target = None if out is None else claim_pooled(out, window.input_shape, batched, last, dy, saved.x)
    batch = dy if batched else dy[None]
    dx = backend.lp_pool_backward(batch, saved.x, saved.argmax, window, saved.norm_type, last, target)
    return dx if batched else unbatched(dx, out)
