"""What max pooling saves of each window: which of its elements was the largest."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.window import Window
from gpu_layers.runtime.cuda import array_module


def argmax_dtype(window: Window) -> np.dtype:
    """Smallest unsigned dtype that numbers the taps of a window."""
    return np.min_scalar_type(window.taps - 1)


def max_pool_indices(argmax: Array, window: Window, channels_last: bool = False, lengths: Any = None) -> Any:
    """Flat index in the input plane of each chosen tap, as ``torch.nn.MaxPool2d(return_indices=True)`` gives it.

    Returns
    -------
    array of int64
        ``argmax``'s shape and kind, NumPy or CuPy; -1 for a window with no tap that counts.
    """
    xp, first_axis = array_module(argmax), 1 if channels_last else 2
    rest = argmax.astype(np.int64)
    flat, inside, step = xp.zeros_like(rest), xp.ones(argmax.shape, bool), 1
    for axis in reversed(range(window.rank)):
        shape = [1] * argmax.ndim
        shape[first_axis + axis] = -1
        origins = xp.asarray(window.origins(axis)).reshape(shape)
        at = origins + rest % window.kernel[axis] * window.dilation[axis]
        rest //= window.kernel[axis]
        size = window.input_shape[axis]
        limit = size if lengths is None else lengths[:, axis].reshape([-1] + [1] * (argmax.ndim - 1))
        inside &= (at >= 0) & (at < limit)
        flat += at * step
        step *= size
    return xp.where(inside, flat, -1)
