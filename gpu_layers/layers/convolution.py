"""2-D convolution as one matrix product: im2col on strided views."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.checks import check_integer
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.writes import write_count
from gpu_layers.layers.precision import rounded, widened
from gpu_layers.layers.weighted_layer import WeightedLayer
from gpu_layers.ops.pool_arguments import per_axis
from gpu_layers.runtime.copying import natural

__all__ = ["Conv2d"]


class Conv2d(WeightedLayer):
    """Cross-correlation of images with learned filters, as in ``torch.nn.Conv2d``.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride : int or tuple of two int
    padding : int or tuple of two int
        Zeros on each side.
    bias : bool
    dtype : {"float32", "float64"}
        Dtype of the parameters: float64 for float64 input, float32 for all others.
    seed : int or numpy.random.Generator, optional
        Seed of the initial weight, shape (out_channels, in_channels, kh, kw); the initial bias is 0. By default
        :func:`gpu_layers.manual_seed` decides.

    Raises
    ------
    TypeError, ValueError
        For a wrong type or value of these.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        *,
        dtype: DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        self.in_channels = check_integer(in_channels, "in_channels", 1, 2**63 - 1)
        self.out_channels = check_integer(out_channels, "out_channels", 1, 2**63 - 1)
        self.kernel_size = per_axis(kernel_size, 2, "kernel_size")
        self.stride = per_axis(stride, 2, "stride")
        self.padding = per_axis(padding, 2, "padding")
        for name, sizes in (("kernel size", self.kernel_size), ("stride", self.stride)):
            if min(sizes) < 1:
                raise ValueError(f"{name} should be greater than zero, but got {name}={list(sizes)}")
        if min(self.padding) < 0:
            raise ValueError(f"negative padding is not supported, but got padding={list(self.padding)}")
        super().__init__((self.out_channels, self.in_channels, *self.kernel_size), bias, dtype, seed)

    def forward(self, x: Array) -> Array:
        """The layer's output.

        Parameters
        ----------
        x : array, shape (N, in_channels, H, W)

        Returns
        -------
        array, shape (N, out_channels, OH, OW)
            x's dtype; ``OH = (H + 2 * padding - kh) // stride + 1``, OW likewise.

        Raises
        ------
        TypeError, ValueError
            For an input of another array type, dtype or shape than the layer's, or smaller than the kernel.
        RuntimeError
            While a graph is captured: CuPy does not capture the product.
        """
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        self._check_input(x, 4, self.in_channels)
        output_size = self._output_size(x.shape)
        with place_of(x):
            y = self._filters(weight) @ self._columns(x, output_size)
            if bias is not None:
                y += bias[:, None]
            # Backward makes the columns again: keeping them would take the input's memory times the kernel's area.
            self._saved = (x, weight, write_count())
            y = y.reshape(self.out_channels, *output_size, x.shape[0])
            return _samples_first(y, x.dtype)

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], self.out_channels, *self._output_size(shape))

    def _gradients(self, dy: Array, x: Array, weight: Array) -> tuple[Array, dict[str, Array]]:
        output_size = self._output_size(x.shape)
        wide = widened(dy, self.dtype).transpose(1, 2, 3, 0)
        wide = wide.reshape(self.out_channels, output_size[0] * output_size[1] * x.shape[0])
        gradients = {"weight": (wide @ self._columns(x, output_size).T).reshape(weight.shape)}
        if "bias" in self.parameters:
            gradients["bias"] = wide.sum(axis=1)
        dx = self._sum_of_columns(self._filters(weight).T @ wide, x.shape, output_size)
        return _samples_first(dx, x.dtype), gradients

    def _filters(self, weight: Array) -> Array:
        return weight.reshape(self.out_channels, -1)

    def _output_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        padded = [size + 2 * pad for size, pad in zip(shape[2:], self.padding, strict=True)]
        if any(size < k for size, k in zip(padded, self.kernel_size, strict=True)):
            raise ValueError(
                f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: "
                f"({self.kernel_size[0]} x {self.kernel_size[1]}). Kernel size can't be greater than actual input size"
            )
        height, width = ((p - k) // s + 1 for p, k, s in zip(padded, self.kernel_size, self.stride, strict=True))
        return height, width

    def _columns(self, x: Array, output_size: tuple[int, int]) -> Array:
        """The inputs of each output as a matrix (in_channels * kh * kw, OH * OW * N) in the parameters' dtype.

        Samples lie side by side: what is copied at a time is as long as there are samples, however small images are.
        """
        xp = array_module(x)
        (samples, channels, height, width), (pad_h, pad_w) = x.shape, self.padding
        padded = xp.zeros((channels, height + 2 * pad_h, width + 2 * pad_w, samples), self.dtype)
        padded[:, pad_h : pad_h + height, pad_w : pad_w + width] = natural(x).transpose(1, 2, 3, 0)
        c, h, w, n = padded.strides
        windows = xp.lib.stride_tricks.as_strided(
            padded,
            shape=(channels, *self.kernel_size, *output_size, samples),
            strides=(c, h, w, h * self.stride[0], w * self.stride[1], n),
        )
        return windows.reshape(channels * self.kernel_size[0] * self.kernel_size[1], np.prod(output_size) * samples)

    def _sum_of_columns(self, columns: Array, shape: tuple[int, ...], output_size: tuple[int, int]) -> Array:
        """The transpose of :meth:`_columns`: each input sums its outputs' gradients, offset by offset."""
        xp = array_module(columns)
        (samples, channels, height, width), (pad_h, pad_w) = shape, self.padding
        columns = columns.reshape(channels, *self.kernel_size, *output_size, samples)
        padded = xp.zeros((channels, height + 2 * pad_h, width + 2 * pad_w, samples), self.dtype)
        rows, cols = (s * (size - 1) + 1 for s, size in zip(self.stride, output_size, strict=True))
        for i in range(self.kernel_size[0]):
            for j in range(self.kernel_size[1]):
                padded[:, i : i + rows : self.stride[0], j : j + cols : self.stride[1]] += columns[:, i, j]
        return padded[:, pad_h : pad_h + height, pad_w : pad_w + width]

    def _configuration(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={'bias' in self.parameters}"
        )


# Rows of a matrix that are transposed at once: in the L1 cache NumPy is eight times as fast.
_TILE = 128


def _samples_first(values: Array, dtype: np.dtype) -> Array:
    """Values with the last axis moved to the front, rounded."""
    if not isinstance(values, np.ndarray):
        return rounded(values.transpose(3, 0, 1, 2), dtype)
    *shape, samples = values.shape
    rows = values.reshape(math.prod(shape), samples)
    found = np.empty((samples, rows.shape[0]), dtype)
    with np.errstate(over="ignore"):
        for first in range(0, rows.shape[0], _TILE):
            found[:, first : first + _TILE] = rows[first : first + _TILE].T
    return found.reshape(samples, *shape)
