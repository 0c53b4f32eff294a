"""The fully connected layer, and the layer that brings images into its shape."""

from __future__ import annotations

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.checks import check_integer
from gpu_layers.core.cuda import place_of
from gpu_layers.core.writes import write_count
from gpu_layers.layers.operation_layer import OperationLayer
from gpu_layers.layers.precision import rounded, widened
from gpu_layers.layers.weighted_layer import WeightedLayer
from gpu_layers.ops.checks import check_dtype, check_gradient
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.copying import natural

__all__ = ["Flatten", "Linear"]


class Linear(WeightedLayer):
    """``y = x @ weight.T + bias``.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    dtype : {"float32", "float64"}
        Dtype of the parameters: float64 for float64 input, float32 for all others.
    seed : int or numpy.random.Generator, optional
        Seed of the initial weight, shape (out_features, in_features); the initial bias is 0. By default
        :func:`gpu_layers.manual_seed` decides.

    Raises
    ------
    TypeError, ValueError
        For a wrong type or value of these.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        self.in_features = check_integer(in_features, "in_features", 1, 2**63 - 1)
        self.out_features = check_integer(out_features, "out_features", 1, 2**63 - 1)
        super().__init__((self.out_features, self.in_features), bias, dtype, seed)

    def forward(self, x: Array) -> Array:
        """The layer's output.

        Parameters
        ----------
        x : array, shape (N, in_features)

        Returns
        -------
        array, shape (N, out_features)
            x's dtype.

        Raises
        ------
        TypeError, ValueError
            For an input of another array type, dtype or shape than the layer's.
        RuntimeError
            While a graph is captured: CuPy does not capture the product.
        """
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        self._check_input(x, 2, self.in_features)
        with place_of(x):
            y = widened(x, self.dtype) @ weight.T
            if bias is not None:
                y += bias
            self._saved = (x, weight, write_count())
            return rounded(y, x.dtype)

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0], self.out_features

    def _gradients(self, dy: Array, x: Array, weight: Array) -> tuple[Array, dict[str, Array]]:
        wide = widened(dy, self.dtype)
        gradients = {"weight": wide.T @ widened(x, self.dtype)}
        if "bias" in self.parameters:
            gradients["bias"] = wide.sum(axis=0)
        return rounded(wide @ weight, x.dtype), gradients

    def _configuration(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={'bias' in self.parameters}"


class Flatten(OperationLayer):
    """All axes but the first as one: ``(N, C, H, W)`` becomes ``(N, C * H * W)``."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Array) -> Array:
        """The same values, shape (N, features).

        Parameters
        ----------
        x : array
            Of at least one axis.

        Returns
        -------
        array, shape (N, features)

        Raises
        ------
        TypeError, ValueError
            For a wrong array type or dtype, or an input without axes.
        """
        backend_for(x)
        check_dtype(x)
        if x.ndim < 1:
            raise ValueError("expected at least 1D input (got 0D input)")
        y = _reshaped(x, (x.shape[0], int(np.prod(x.shape[1:]))))
        self._saved = (x.shape, x.dtype)
        return y

    def _gradient(self, dy: Array, saved: tuple[tuple[int, ...], np.dtype]) -> Array:
        shape, dtype = saved
        backend_for(dy)
        check_gradient(dy, (shape[0], int(np.prod(shape[1:]))), dtype)
        return _reshaped(dy, shape)


def _reshaped(x: Array, shape: tuple[int, ...]) -> Array:
    with place_of(x):
        # A strided array is copied.
        return (x if x.flags.c_contiguous else natural(x)).reshape(shape)
