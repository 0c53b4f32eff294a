"""What the pooling layers share: the window's numbers, checked when the layer is made."""

from __future__ import annotations

from gpu_layers.core.array import Options
from gpu_layers.layers.operation_layer import OperationLayer
from gpu_layers.ops.pool_arguments import Padding, PerAxis, check_window, per_axis


class Pool(OperationLayer):
    """A layer that pools ``_rank`` axes."""

    _rank: int


class WindowPool(Pool):
    """One with a sliding window."""

    def __init__(
        self,
        kernel_size: PerAxis,
        stride: PerAxis | None,
        padding: Padding,
        dilation: PerAxis,
        ceil_mode: bool,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        steps = kernel_size if stride is None else stride
        self.stride: PerAxis | None = steps
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode, self.channels_last = bool(ceil_mode), bool(channels_last)
        self._kernel = per_axis(kernel_size, self._rank, "kernel_size")
        check_window(
            self._kernel, per_axis(steps, self._rank, "stride"), padding, per_axis(dilation, self._rank, "dilation")
        )

    @property
    def window_arguments(self) -> Options:
        """The window as the operations take it."""
        return {
            "kernel_size": self._kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "ceil_mode": self.ceil_mode,
        }

    def _extras(self, show_dilation: bool = False) -> str:
        """Of the repr: what PyTorch's layer does not have."""
        extras = f", dilation={self.dilation}" if show_dilation and self.dilation != 1 else ""
        return extras + (", channels_last=True" if self.channels_last else "")
