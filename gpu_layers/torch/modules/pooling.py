"""Pooling modules: torch's, on other kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from gpu_layers.torch.functional import pooling
from gpu_layers.torch.functional.pooling import Pooled
from gpu_layers.torch.leaf import call_of

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


class _Pool(nn.Module):
    """What the modules of one pooling share, whatever their number of spatial axes."""

    _rank: ClassVar[int]


class _MaxPool(_Pool):
    """``torch.nn``'s, which keeps one byte per output for backward, for windows of at most 256 taps."""

    def forward(self, input: Tensor) -> Pooled:
        """Largest value of each window; with ``return_indices`` also where it was."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        held = self.__dict__  # at once; a module's attributes are looked for in three places
        return pooling.max_pool(
            self._rank,
            input,
            held["kernel_size"],
            held["stride"],
            held["padding"],
            held["dilation"],
            held["ceil_mode"],
            held["return_indices"],
        )


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    __doc__ = _MaxPool.__doc__
    _rank = 1


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    __doc__ = _MaxPool.__doc__
    _rank = 2


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    __doc__ = _MaxPool.__doc__
    _rank = 3


class _AvgPool(_Pool):
    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        held = self.__dict__
        return pooling.avg_pool(
            self._rank,
            input,
            held["kernel_size"],
            held["stride"],
            held["padding"],
            held["ceil_mode"],
            held["count_include_pad"],
            held.get("divisor_override"),  # which torch.nn.AvgPool1d has not
        )


class AvgPool1d(_AvgPool, nn.AvgPool1d):
    """``torch.nn.AvgPool1d``."""

    _rank = 1


class AvgPool2d(_AvgPool, nn.AvgPool2d):
    """``torch.nn.AvgPool2d``."""

    _rank = 2


class AvgPool3d(_AvgPool, nn.AvgPool3d):
    """``torch.nn.AvgPool3d``."""

    _rank = 3


class _LPPool(_Pool):
    """``torch.nn``'s, of ``abs(input)``."""

    def forward(self, input: Tensor) -> Tensor:
        """``(sum |x|^p)^(1/p)`` of each window."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        return pooling.lp_pool(self._rank, input, self.norm_type, self.kernel_size, self.stride, self.ceil_mode)


class LPPool1d(_LPPool, nn.LPPool1d):
    __doc__ = _LPPool.__doc__
    _rank = 1


class LPPool2d(_LPPool, nn.LPPool2d):
    __doc__ = _LPPool.__doc__
    _rank = 2


class LPPool3d(_LPPool, nn.LPPool3d):
    __doc__ = _LPPool.__doc__
    _rank = 3


class _AdaptiveMaxPool(_Pool):
    def forward(self, input: Tensor) -> Pooled:
        """Largest value of each window; with ``return_indices`` also where it was."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        return pooling.adaptive_max_pool(self._rank, input, self.output_size, self.return_indices)


class AdaptiveMaxPool1d(_AdaptiveMaxPool, nn.AdaptiveMaxPool1d):
    """``torch.nn.AdaptiveMaxPool1d``."""

    _rank = 1


class AdaptiveMaxPool2d(_AdaptiveMaxPool, nn.AdaptiveMaxPool2d):
    """``torch.nn.AdaptiveMaxPool2d``."""

    _rank = 2


class AdaptiveMaxPool3d(_AdaptiveMaxPool, nn.AdaptiveMaxPool3d):
    """``torch.nn.AdaptiveMaxPool3d``."""

    _rank = 3


class _AdaptiveAvgPool(_Pool):
    def forward(self, input: Tensor) -> Tensor:
        """Mean of each window."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        return pooling.adaptive_avg_pool(self._rank, input, self.output_size)


class AdaptiveAvgPool1d(_AdaptiveAvgPool, nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d``."""

    _rank = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d``."""

    _rank = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool, nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d``."""

    _rank = 3


class _MaxUnpool(_Pool):
    """``torch.nn``'s; where indices are equal, the last value is kept."""

    def forward(self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Each value at its index in the output, and 0 elsewhere."""
        if not isinstance(input, Tensor):
            return call_of(self, input, indices, output_size)
        return pooling.max_unpool(self._rank, input, indices, self.kernel_size, self.stride, self.padding, output_size)


class MaxUnpool1d(_MaxUnpool, nn.MaxUnpool1d):
    __doc__ = _MaxUnpool.__doc__
    _rank = 1


class MaxUnpool2d(_MaxUnpool, nn.MaxUnpool2d):
    __doc__ = _MaxUnpool.__doc__
    _rank = 2


class MaxUnpool3d(_MaxUnpool, nn.MaxUnpool3d):
    __doc__ = _MaxUnpool.__doc__
    _rank = 3


#: The class that takes the place of a torch.nn class.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {getattr(nn, name): globals()[name] for name in __all__}
