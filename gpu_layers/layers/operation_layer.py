"""A layer whose backward is that of one operation."""

from __future__ import annotations

from typing import Any, ClassVar

from gpu_layers.core.array import Array
from gpu_layers.layers.base import Layer


class OperationLayer(Layer):
    """A layer that saves what its operation's forward returns, and whose backward is the operation ``_gradient``."""

    _gradient: ClassVar[Any]

    def backward(self, dy: Array) -> Array:
        """Gradient of the last forward's input.

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
            Before any forward; for what reads x, also if this library has written to x since.
        """
        return self._gradient(dy, self._saved_by_forward())
