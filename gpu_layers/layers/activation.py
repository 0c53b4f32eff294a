"""Activation layers."""

from __future__ import annotations

from gpu_layers.core.array import Array
from gpu_layers.layers.operation_layer import OperationLayer
from gpu_layers.ops.activation import relu_backward, relu_forward

__all__ = ["ReLU"]


class ReLU(OperationLayer):
    """``max(x, 0)``.

    Parameters
    ----------
    inplace : bool
        Write the output into the input.
    """

    _gradient = staticmethod(relu_backward)

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = bool(inplace)

    def forward(self, x: Array) -> Array:
        """``max(x, 0)``; NaN stays NaN.

        Parameters
        ----------
        x : array
            Any shape.

        Returns
        -------
        array
            x's shape and dtype; x itself if inplace.

        Raises
        ------
        TypeError, ValueError
            For a wrong array type or dtype, or an input that cannot be changed in place.
        """
        y, self._saved = relu_forward(x, out=x if self.inplace else None)
        return y

    def _configuration(self) -> str:
        return "inplace=True" if self.inplace else ""
