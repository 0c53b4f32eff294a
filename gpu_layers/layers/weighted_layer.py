"""What the layers that multiply by a weight share: parameters, and backward."""

from __future__ import annotations

import math

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.cuda import place_of, refuse_capture
from gpu_layers.core.writes import check_unwritten
from gpu_layers.layers.initialization import he_normal
from gpu_layers.layers.operation_layer import OperationLayer
from gpu_layers.layers.precision import check_input, parameter_dtype
from gpu_layers.ops.checks import check_gradient
from gpu_layers.runtime.backend import backend_for


class WeightedLayer(OperationLayer):
    """A layer with a weight of a shape (outputs, inputs), and maybe a bias; forward saves x, weight and writes."""

    def __init__(
        self, shape: tuple[int, ...], bias: bool, dtype: DTypeLike, seed: int | np.random.Generator | None
    ) -> None:
        super().__init__()
        self.dtype = parameter_dtype(dtype)
        self.parameters["weight"] = he_normal(shape, math.prod(shape[1:]), self.dtype, seed)
        if bias:
            self.parameters["bias"] = np.zeros(shape[0], self.dtype)

    def _check_input(self, x: Array, rank: int, features: int) -> None:
        check_input(x, self.parameters["weight"], rank, features)
        refuse_capture(x, type(self).__name__, "CuPy does not capture products of matrices")

    def _gradient(self, dy: Array, saved: tuple[Array, Array, int]) -> Array:
        x, weight, writes = saved
        backend_for(dy, x)
        check_gradient(dy, self._output_shape(x.shape), x.dtype)
        check_unwritten(writes, x=x, weight=weight)
        with place_of(x):
            dx, self.gradients = self._gradients(dy, x, weight)
        return dx

    def _output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the output for an input of a shape."""
        raise NotImplementedError

    def _gradients(self, dy: Array, x: Array, weight: Array) -> tuple[Array, dict[str, Array]]:
        """Of x, and of the parameters."""
        raise NotImplementedError
