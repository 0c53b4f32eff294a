"""What dropouts save for their backwards: the last is an argument of both backends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.mask import DropoutMask
from gpu_layers.core.writes import check_unwritten, write_count

_Saved = TypeVar("_Saved", bound="ActivationDropoutSaved")


@dataclass(slots=True)
class DropoutSaved:
    """What backward needs: a few numbers, and a copy of the sample ids if there were any.

    Attributes
    ----------
    mask : DropoutMask
        Which elements are kept.
    scale : float
        Factor of a kept element.
    shape : tuple of int
    dtype : numpy.dtype
    channels_last : bool
    writes : int
        :func:`write_count` of the forward: a later call may use the array that holds the numbers.
    """

    mask: DropoutMask
    scale: float
    shape: tuple[int, ...]
    dtype: np.dtype
    channels_last: bool = False
    writes: int = field(default_factory=write_count)

    def with_rng_state(self, rng_state: Array) -> DropoutSaved:
        """The same, for the call whose numbers are in ``rng_state``."""
        return replace(self, mask=self.mask._replace(rng_state=rng_state), writes=write_count())

    def check_unwritten(self) -> None:
        """RuntimeError if a later call has overwritten this call's numbers."""
        check_unwritten(self.writes, rng_state=self.mask.rng_state)


@dataclass(slots=True)
class ActivationDropoutSaved:
    """What backward needs: x and numbers; less where the gradient does not depend on x.

    Attributes
    ----------
    activation, order : str
    dropout : DropoutSaved
        The mask as numbers.
    x : array or None
        The input itself. Backward notices what this library has written to it. None for identity, and for relu
        where there are gradient_bits.
    gradient_bits : array of uint8 or None
        For relu, unless channels are last, one bit per element instead: kept and positive. That moves fewer bytes than
        reading the output again (8.25 per element of bfloat16 in both directions, not 10), and keeps fewer, unless the
        output is kept anyway.
    writes : int
        :func:`write_count` of the forward.
    """

    activation: str
    order: str
    dropout: DropoutSaved
    x: Array = None
    gradient_bits: Array = None
    writes: int = field(default_factory=write_count)

    @property
    def is_first(self) -> bool:
        """Whether dropout stood before the activation."""
        return self.order == "before"

    def with_rng_state(self: _Saved, rng_state: Array) -> _Saved:
        """The same, for the call whose numbers are in ``rng_state``."""
        return replace(self, dropout=self.dropout.with_rng_state(rng_state))


@dataclass(slots=True)
class DropoutAddSaved(ActivationDropoutSaved):
    """What backward needs: also of the bias.

    Attributes
    ----------
    bias : array or None
        As the kernels take it, where x is kept.
    bias_dtype : dtype or None
        Dtype of the bias, if there was one.
    """

    bias: Array = None
    bias_dtype: np.dtype | None = None

    @property
    def has_bias(self) -> bool:
        """Whether the gradient of a bias is asked for."""
        return self.bias_dtype is not None
