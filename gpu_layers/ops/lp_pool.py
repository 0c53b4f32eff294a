"""Power-average pooling as a stateless pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers.ops.checks import check_gradient, check_number
from gpu_layers.ops.pool_arguments import Padding, place_window
from gpu_layers.runtime.backend import backend_for
from gpu_layers.window import Window


@dataclass(slots=True)
class LPPoolSaved:
    """What backward needs.

    Attributes
    ----------
    x, y : array
        Copies of the (batched) input and output; None for p = inf, but for the input's.
    taps : array of unsigned integers, or None
        For p = inf: number of the tap that won.
    window : Window
    norm_type : float
    output_shape : tuple of int
    dtype : numpy.dtype
    channels_last, batched : bool
    """

    x: Any
    y: Any
    taps: Any
    window: Window
    norm_type: float
    output_shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool
    batched: bool


def check_norm_type(norm_type: Any) -> float:
    """The p of a norm as a float: TypeError unless a number, ValueError unless positive."""
    p = check_number(norm_type, "norm_type")
    if not p > 0:
        raise ValueError(f"norm_type must be greater than zero, but got {norm_type}")
    return p


def lp_pool_forward(
    x: Any,
    norm_type: float,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    *,
    ceil_mode: bool = False,
    channels_last: bool = False,
) -> tuple[Any, LPPoolSaved]:
    """``(sum |x|^p)^(1/p)`` of each window: its taps inside the input, as ONNX defines it.

    Parameters
    ----------
    x, kernel_size, stride, padding, dilation, ceil_mode, channels_last
        As in :func:`max_pool_forward`.
    norm_type : float
        p, above 0; inf takes the largest ``|x|``.

    Returns
    -------
    y : array
        Summed in float32 for half types.
    saved : LPPoolSaved

    Raises
    ------
    TypeError, ValueError
        As :func:`max_pool_forward`; ValueError for a p of 0 or less.
    """
    backend = backend_for(x)
    p = check_norm_type(norm_type)
    batched, window = place_window(x, kernel_size, stride, padding, dilation, ceil_mode, channels_last)
    batch = x if batched else x[None]
    y, taps = backend.lp_pool_forward(batch, window, p, channels_last)
    # Copies: the caller may change x and y before backward.
    saved_y = y.copy() if taps is None else None
    result = y if batched else y[0]
    return result, LPPoolSaved(batch.copy(), saved_y, taps, window, p, result.shape, x.dtype, channels_last, batched)


def lp_pool_backward(dy: Any, saved: LPPoolSaved) -> Any:
    """``sign(x) |x|^(p-1) sum(dy y^(1-p))`` over the windows of each element.

    Where x, or a whole window, is 0, the gradient is 0. For p = inf each gradient goes to the first of the largest.

    Parameters
    ----------
    dy : array
        Shape and dtype of y.
    saved : LPPoolSaved

    Returns
    -------
    array
        Shape and dtype of x.
    """
    backend = backend_for(dy, saved.x)
    check_gradient(dy, saved.output_shape, saved.dtype)
    batch = dy if saved.batched else dy[None]
    dx = backend.lp_pool_backward(
        batch, saved.x, saved.y, saved.taps, saved.window, saved.norm_type, saved.channels_last
    )
    return dx if saved.batched else dx[0]
