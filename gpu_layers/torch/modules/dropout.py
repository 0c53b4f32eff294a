"""Dropout modules."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gpu_layers.ops.activation_dropout import check_order
from gpu_layers.random import Generator
from gpu_layers.torch import functional
from gpu_layers.torch.checks import check_probability, checked_activation
from gpu_layers.torch.leaf import call_of
from gpu_layers.torch.random import check_generator

__all__ = [
    "ActivationDropout",
    "AlphaDropout",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "FeatureAlphaDropout",
]


class _WithGenerator(nn.Module):
    """What the dropout modules of torch get in addition to their own arguments.

    Attributes
    ----------
    generator : gpu_layers.Generator or None
        Where the masks come from; None for torch's default generator of the input's device.
    """

    _function: ClassVar[Any]
    # For modules that were made by torch.nn and retyped.
    generator: Generator | None = None

    def __init__(self, p: float = 0.5, inplace: bool = False, *, generator: Generator | None = None) -> None:
        super().__init__(p, inplace)
        check_generator(generator)
        self.generator = generator

    def forward(self, input: Tensor) -> Tensor:
        """Drop in training; the input itself in evaluation."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        return self._function(input, self.p, self.training, self.inplace, generator=self.generator)


class Dropout(_WithGenerator, nn.Dropout):
    """``torch.nn.Dropout``; keeps no mask for backward.

    Parameters
    ----------
    p, inplace
        As torch's.
    generator : gpu_layers.Generator, optional
        Where the masks come from: one offset per training forward, and the same bits on every device. By default
        torch's default generator of the input's device decides, with one draw per training forward.

    Raises
    ------
    ValueError
        For p outside [0, 1].
    TypeError
        If p is not a number, or generator is not a gpu_layers.Generator.
    """

    _function = staticmethod(functional.dropout)


class Dropout1d(_WithGenerator, nn.Dropout1d):
    """``torch.nn.Dropout1d``: whole channels; parameters and errors as :class:`Dropout`."""

    _function = staticmethod(functional.dropout1d)


class Dropout2d(_WithGenerator, nn.Dropout2d):
    """``torch.nn.Dropout2d``: whole channels; parameters and errors as :class:`Dropout`."""

    _function = staticmethod(functional.dropout2d)


class Dropout3d(_WithGenerator, nn.Dropout3d):
    """``torch.nn.Dropout3d``: whole channels; parameters and errors as :class:`Dropout`."""

    _function = staticmethod(functional.dropout3d)


class AlphaDropout(_WithGenerator, nn.AlphaDropout):
    """``torch.nn.AlphaDropout``, for SELU networks; parameters and errors as :class:`Dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop in training; the input itself in evaluation."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        return functional.alpha_dropout(input, self.p, self.training, generator=self.generator)


class FeatureAlphaDropout(_WithGenerator, nn.FeatureAlphaDropout):
    """``torch.nn.FeatureAlphaDropout``: whole channels; parameters and errors as :class:`Dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop in training; the input itself in evaluation."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        return functional.feature_alpha_dropout(input, self.p, self.training, generator=self.generator)


class _Masking(nn.Module):
    """What the modules that torch does not have share."""

    def __init__(self, p: float, generator: Generator | None) -> None:
        super().__init__()
        check_generator(generator)
        self.p = check_probability(p)
        self.generator = generator

    def extra_repr(self) -> str:
        """As torch's."""
        return f"p={self.p}"


class DropPath(_Masking):
    """Stochastic depth (Huang et al., 2016): drop whole samples with probability p, divide the others by ``1 - p``.

    Parameters
    ----------
    p : float
        In [0, 1].
    generator : gpu_layers.Generator, optional
        As of :class:`Dropout`.

    Raises
    ------
    ValueError, TypeError
        As :class:`Dropout`.
    """

    def __init__(self, p: float = 0.0, *, generator: Generator | None = None) -> None:
        super().__init__(p, generator)

    def forward(self, input: Tensor) -> Tensor:
        """Drop in training; the input itself in evaluation."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        return functional.drop_path(input, self.p, self.training, generator=self.generator)


class DropoutAdd(_Masking):
    """``residual + dropout(input)``, one kernel each way; parameters and errors as :class:`Dropout`."""

    def __init__(self, p: float = 0.5, *, generator: Generator | None = None) -> None:
        super().__init__(p, generator)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        """``residual + dropout(input)``; in evaluation ``residual + input``."""
        if not isinstance(input, Tensor):
            return call_of(self, input, residual)
        return functional.dropout_add(input, residual, self.p, self.training, generator=self.generator)


class ActivationDropout(_Masking):
    """Activation and dropout in one kernel each way, which keeps nothing but the input for backward.

    Parameters
    ----------
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        leaky_relu has a slope of 0.01, gelu is the exact one; None is the identity.
    p : float
        In [0, 1].
    order : {"after", "before"}
        Dropout after the activation, or before it.
    generator : gpu_layers.Generator, optional
        As of :class:`Dropout`.

    Raises
    ------
    ValueError, TypeError
        As :class:`Dropout`; ValueError for an unknown activation or order.
    """

    def __init__(
        self, activation: str, p: float = 0.5, *, order: str = "after", generator: Generator | None = None
    ) -> None:
        super().__init__(p, generator)
        checked_activation(activation)
        self.activation, self.order = activation, check_order(order)

    def forward(self, input: Tensor) -> Tensor:
        """Activate and drop; in evaluation activate."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        return functional.activation_dropout(
            input, self.activation, self.p, self.training, order=self.order, generator=self.generator
        )

    def extra_repr(self) -> str:
        """As torch's."""
        order = "" if self.order == "after" else f", order={self.order!r}"
        return f"activation={self.activation!r}, p={self.p}{order}"


#: The class that takes the place of a torch.nn class.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(torch.nn, one.__name__): one
    for one in (Dropout, Dropout1d, Dropout2d, Dropout3d, AlphaDropout, FeatureAlphaDropout)
}
