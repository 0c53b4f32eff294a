"""A layer whose backward is that of one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.layers.base import Layer


class OperationLayer(Layer):
    """A layer that saves what its operation's forward returns, and whose backward is the operation ``_gradient``."""

    _gradient: Callable[..., Any]

    def backward(self, dy: Array) -> Array:
        """Gradient of the last forward's input; assigns :attr:`gradients`, if there are parameters.

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
            Before any forward; or if this library has since written to what backward reads: to x or a weight, in place
            or by an optimizer, or to the numbers of a :class:`CudaGraphGenerator`'s masks.
        """
        return self._gradient(dy, self._saved_by_forward())
