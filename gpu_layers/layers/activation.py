"""Activation layers."""

from __future__ import annotations

from gpu_layers.core.array import Array
from gpu_layers.layers.base import Layer
from gpu_layers.ops.activation import relu_backward, relu_forward

__all__ = ["ReLU"]


class ReLU(Layer):
    """``max(x, 0)``.

    Parameters
    ----------
    inplace : bool
        Write the output into the input.
    """

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

    def backward(self, dy: Array) -> Array:
        """``dy`` where the input was positive (or NaN), 0 elsewhere.

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
        return relu_backward(dy, self._saved_by_forward())

    def _configuration(self) -> str:
        return "inplace=True" if self.inplace else ""
