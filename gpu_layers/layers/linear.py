"""The fully connected layer, and the layer that brings images into its shape."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_integer
from gpu_layers.core.cuda import place_of
from gpu_layers.core.writes import check_unwritten, write_count
from gpu_layers.layers.base import Layer
from gpu_layers.layers.initialization import he_normal
from gpu_layers.layers.precision import check_input, parameter_dtype, rounded, widened
from gpu_layers.ops.checks import check_dtype, check_gradient
from gpu_layers.runtime.backend import backend_for

__all__ = ["Flatten", "Linear"]


class Linear(Layer):
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
        dtype: Any = "float32",
        seed: int | np.random.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_integer(in_features, "in_features", 1, 2**63 - 1)
        self.out_features = check_integer(out_features, "out_features", 1, 2**63 - 1)
        self.dtype = parameter_dtype(dtype)
        shape = (self.out_features, self.in_features)
        self.parameters["weight"] = he_normal(shape, self.in_features, self.dtype, seed)
        if bias:
            self.parameters["bias"] = np.zeros(self.out_features, self.dtype)

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
        """
        weight, bias = self.parameters["weight"], self.parameters.get("bias")
        check_input(x, weight, 2, self.in_features)
        with place_of(x):
            y = widened(x, self.dtype) @ weight.T
            if bias is not None:
                y += bias
            self._saved = (x, weight, write_count())
            return rounded(y, x.dtype)

    def backward(self, dy: Array) -> Array:
        """Gradient of x; assigns :attr:`gradients` of weight and bias.

        Parameters
        ----------
        dy : array
            Gradient of the last forward's output, of its shape and dtype.

        Returns
        -------
        array
            x's shape and dtype.

        Raises
        ------
        TypeError, ValueError
            If dy has another array type, dtype or shape.
        RuntimeError
            Before any forward, or if x or weight has been written to since: by a layer in place or an optimizer.
        """
        x, weight, writes = self._saved_by_forward()
        backend_for(dy, x)
        check_gradient(dy, (x.shape[0], self.out_features), x.dtype)
        check_unwritten(writes, x=x, weight=weight)
        with place_of(x):
            wide = widened(dy, self.dtype)
            self.gradients = {"weight": wide.T @ widened(x, self.dtype)}
            if "bias" in self.parameters:
                self.gradients["bias"] = wide.sum(axis=0)
            return rounded(wide @ weight, x.dtype)

    def _configuration(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={'bias' in self.parameters}"


class Flatten(Layer):
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
        y = x.reshape(x.shape[0], int(np.prod(x.shape[1:])))
        self._saved = (x.shape, x.dtype)
        return y

    def backward(self, dy: Array) -> Array:
        """``dy`` in the input's shape.

        Parameters
        ----------
        dy : array
            Gradient of the last forward's output, of its shape and dtype.

        Returns
        -------
        array
            x's shape and dtype.

        Raises
        ------
        TypeError, ValueError
            If dy has another array type, dtype or shape.
        RuntimeError
            Before any forward.
        """
        shape, dtype = self._saved_by_forward()
        backend_for(dy)
        check_gradient(dy, (shape[0], int(np.prod(shape[1:]))), dtype)
        return dy.reshape(shape)
