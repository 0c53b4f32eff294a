"""Activation layers."""

from __future__ import annotations

from typing import Any

from gpu_layers.layers.base import Layer
from gpu_layers.ops.activation import relu_backward, relu_forward


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

    def forward(self, x: Any) -> Any:
        """``max(x, 0)`` for an array of any shape; NaN stays NaN."""
        y, self._saved = relu_forward(x, out=x if self.inplace else None)
        return y

    def backward(self, dy: Any) -> Any:
        """``dy`` where the output was positive, 0 elsewhere."""
        return relu_backward(dy, self._saved_by_forward())

    def _configuration(self) -> str:
        return "inplace=True" if self.inplace else ""
