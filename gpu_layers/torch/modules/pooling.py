"""Pooling modules: torch's, on other kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpu_layers.torch import functional

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
]


class _Max(nn.Module):
    """``torch.nn``'s, which keeps one byte an output for backward, for windows of at most 256 taps."""


class MaxPool1d(_Max, nn.MaxPool1d):
    __doc__ = _Max.__doc__

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window; with ``return_indices`` also where it was."""
        return functional.max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool2d(_Max, nn.MaxPool2d):
    __doc__ = _Max.__doc__

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window; with ``return_indices`` also where it was."""
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool3d(_Max, nn.MaxPool3d):
    __doc__ = _Max.__doc__

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window; with ``return_indices`` also where it was."""
        return functional.max_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AvgPool1d(nn.AvgPool1d):
    """``torch.nn.AvgPool1d``."""

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        return functional.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


class AvgPool2d(nn.AvgPool2d):
    """``torch.nn.AvgPool2d``."""

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool3d(nn.AvgPool3d):
    """``torch.nn.AvgPool3d``."""

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        return functional.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class LPPool1d(nn.LPPool1d):
    """``torch.nn.LPPool1d`` of ``abs(input)``."""

    def forward(self, input: Tensor) -> Tensor:
        """``(sum |x|^p)^(1/p)`` of each window."""
        return functional.lp_pool1d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class LPPool2d(nn.LPPool2d):
    """``torch.nn.LPPool2d`` of ``abs(input)``."""

    def forward(self, input: Tensor) -> Tensor:
        """``(sum |x|^p)^(1/p)`` of each window."""
        return functional.lp_pool2d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class LPPool3d(nn.LPPool3d):
    """``torch.nn.LPPool3d`` of ``abs(input)``."""

    def forward(self, input: Tensor) -> Tensor:
        """``(sum |x|^p)^(1/p)`` of each window."""
        return functional.lp_pool3d(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode)


class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    """``torch.nn.AdaptiveMaxPool1d``."""

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window; with ``return_indices`` also where it was."""
        return functional.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d``."""

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window; with ``return_indices`` also where it was."""
        return functional.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    """``torch.nn.AdaptiveMaxPool3d``."""

    def forward(self, input: Tensor) -> Any:
        """Largest value of each window; with ``return_indices`` also where it was."""
        return functional.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d``."""

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        return functional.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d``."""

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        return functional.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d``."""

    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        return functional.adaptive_avg_pool3d(input, self.output_size)


class MaxUnpool1d(nn.MaxUnpool1d):
    """``torch.nn.MaxUnpool1d``; of equal indices the last counts."""

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        """Each value at its index in the output, and 0 elsewhere."""
        return functional.max_unpool1d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool2d(nn.MaxUnpool2d):
    """``torch.nn.MaxUnpool2d``; of equal indices the last counts."""

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        """Each value at its index in the output, and 0 elsewhere."""
        return functional.max_unpool2d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool3d(nn.MaxUnpool3d):
    """``torch.nn.MaxUnpool3d``; of equal indices the last counts."""

    def forward(self, input: Tensor, indices: Tensor, output_size: Any = None) -> Tensor:
        """Each value at its index in the output, and 0 elsewhere."""
        return functional.max_unpool3d(input, indices, self.kernel_size, self.stride, self.padding, output_size)


#: The class that takes the place of a torch.nn class.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, one.__name__): one
    for one in (
        MaxPool1d,
        MaxPool2d,
        MaxPool3d,
        AvgPool1d,
        AvgPool2d,
        AvgPool3d,
        LPPool1d,
        LPPool2d,
        LPPool3d,
        AdaptiveMaxPool1d,
        AdaptiveMaxPool2d,
        AdaptiveMaxPool3d,
        AdaptiveAvgPool1d,
        AdaptiveAvgPool2d,
        AdaptiveAvgPool3d,
        MaxUnpool1d,
        MaxUnpool2d,
        MaxUnpool3d,
    )
}
