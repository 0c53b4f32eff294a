"""What the pooling layers share: their backward, and the window's numbers, checked when the layer is made."""

from __future__ import annotations

from typing import Any, ClassVar

from gpu_layers.core.array import Array
from gpu_layers.layers.base import Layer
from gpu_layers.ops.pool_arguments import check_window, per_axis


class Pool(Layer):
    """A layer that pools ``_rank`` axes, and whose backward is the operation ``_gradient``."""

    _rank: int
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


class WindowPool(Pool):
    """One with a sliding window."""

    def __init__(self, kernel_size: Any, stride: Any, padding: Any, dilation: Any, channels_last: bool) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding
        self.dilation = dilation
        self.channels_last = bool(channels_last)
        self._kernel = per_axis(kernel_size, self._rank, "kernel_size")
        check_window(
            self._kernel,
            per_axis(self.stride, self._rank, "stride"),
            padding,
            per_axis(dilation, self._rank, "dilation"),
        )

    def _extras(self, show_dilation: bool = False) -> str:
        """Of the repr: what PyTorch's layer does not have."""
        extras = f", dilation={self.dilation}" if show_dilation and self.dilation != 1 else ""
        return extras + (", channels_last=True" if self.channels_last else "")
