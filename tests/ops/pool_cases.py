"""What the tests of max and average pooling share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from gpu_layers.core.window import sliding_window

TORCH_MAX_POOL = {
    1: torch.nn.functional.max_pool1d,
    2: torch.nn.functional.max_pool2d,
    3: torch.nn.functional.max_pool3d,
}
TORCH_AVG_POOL = {
    1: torch.nn.functional.avg_pool1d,
    2: torch.nn.functional.avg_pool2d,
    3: torch.nn.functional.avg_pool3d,
}

#: Odd and even, thinner than a window, one element: (N, C, *spatial).
SHAPES = {
    1: [(2, 3, 11), (1, 1, 1), (1, 2, 4)],
    2: [(2, 3, 7, 9), (1, 2, 1, 6), (3, 1, 4, 5)],
    3: [(1, 2, 5, 4, 6), (2, 1, 1, 3, 2)],
}
_KERNELS = {1: [(1,), (2,), (3,), (5,)], 2: [(1, 1), (2, 2), (3, 3), (2, 3), (1, 4)], 3: [(2, 2, 2), (3, 1, 2)]}
_STRIDES = {1: [None, 1, (2,), 3], 2: [None, 1, (2, 1), 3], 3: [None, 1, (1, 2, 3)]}
_DILATIONS = {1: [1, (2,), 3], 2: [1, (2, 1), 2], 3: [1, (1, 2, 2)]}
#: Windows that operations and layers refuse: what differs from a kernel of 3 x 3, and what is said.
BAD_WINDOWS = [
    ({"kernel_size": (0, 2)}, ValueError, "^kernel size should be greater than zero, but got "),
    ({"kernel_size": (2, -1)}, ValueError, "^kernel size should be greater than zero, but got "),
    ({"kernel_size": (2.0, 2)}, TypeError, "kernel_size must be an integer, got float"),
    ({"kernel_size": (True, 2)}, TypeError, "kernel_size must be an integer, got bool"),
    ({"kernel_size": (None, 2)}, TypeError, "kernel_size must be an integer, got NoneType"),
    ({"kernel_size": (2**40, 2)}, ValueError, "kernel_size must be in"),
    ({"stride": 0}, ValueError, "^stride should be greater than zero, but got "),
    ({"stride": (1, -2)}, ValueError, "^stride should be greater than zero, but got "),
    ({"stride": 1.0}, TypeError, "stride must be an integer, got float"),
    ({"stride": (1, 1, 1)}, ValueError, "stride must be an int, or 2 of them, one a spatial axis"),
    ({"padding": -1}, ValueError, "^pad must be non-negative, but got pad: -1$"),
    (
        {"padding": 2},
        ValueError,
        "^pad should be at most half of effective kernel size, but got pad=2, kernel_size=3 and dilation=1$",
    ),
    (
        {"padding": (0, 3), "dilation": 2},
        ValueError,
        "^pad should be at most half of effective kernel size, but got pad=3, kernel_size=3 and dilation=2$",
    ),
    ({"padding": "1"}, TypeError, "padding must be an integer, got str"),
    ({"padding": None}, TypeError, "padding must be an integer, got NoneType"),
    ({"dilation": 0}, ValueError, "^dilation should be greater than zero, but got "),
    ({"dilation": 1.5}, TypeError, "dilation must be an integer, got float"),
]


def per_axis(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * rank


def configurations(rank: int, dilated: bool = True) -> Iterator[dict]:
    """Arguments of a pooling that make a window, though it need not fit into every shape."""
    dilations = _DILATIONS[rank] if dilated else [1]
    for kernel, stride, dilation, ceil_mode in itertools.product(
        _KERNELS[rank], _STRIDES[rank], dilations, (False, True)
    ):
        half = tuple(k // 2 for k in kernel)
        for padding in dict.fromkeys([(0,) * rank, half, (*half[:-1], 0)]):
            yield {
                "kernel_size": kernel,
                "stride": stride,
                "padding": padding,
                "dilation": dilation,
                "ceil_mode": ceil_mode,
            }


def taps_inside(window) -> np.ndarray:
    """Number of taps of each window that lie inside the input, counted one by one along each axis."""
    counts = np.ones((), int)
    for kernel, stride, dilation, padding, size, outputs in zip(
        window.kernel,
        window.stride,
        window.dilation,
        window.pad_before,
        window.input_shape,
        window.output_shape,
        strict=True,
    ):
        inside = [sum(0 <= i * stride - padding + k * dilation < size for k in range(kernel)) for i in range(outputs)]
        counts = np.multiply.outer(counts, inside)
    return counts


def window_of(shape: tuple[int, ...], options: dict):
    rank = len(options["kernel_size"])
    stride = options["kernel_size"] if options["stride"] is None else per_axis(options["stride"], rank)
    padding, dilation = per_axis(options["padding"], rank), per_axis(options["dilation"], rank)
    return sliding_window(
        options["kernel_size"], stride, dilation, padding, padding, options["ceil_mode"], tuple(shape[2:])
    )
