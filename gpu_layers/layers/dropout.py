"""Dropout layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_layers import random
from gpu_layers.layers.base import Layer
from gpu_layers.ops.checks import check_dtype, check_gradient, check_probability
from gpu_layers.ops.dropout import DropoutSaved, dropout_backward, dropout_forward
from gpu_layers.runtime.backend import backend_for

_SCALINGS = ("inverted", "inference")


@dataclass(frozen=True)
class _IdentitySaved:
    """What the backward of an identity needs, to check dy."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Dropout(Layer):
    """Drop each element with probability p in training.

    With ``scaling="inverted"`` the kept ones are divided by ``1 - p``, so that the expectation is the input and
    evaluation is the identity. With ``scaling="inference"`` (Srivastava et al., 2014) they are kept as they are, and
    evaluation multiplies by ``1 - p`` instead.

    Parameters
    ----------
    p : float
        In [0, 1].
    inplace : bool
        Write the output into the input.
    scaling : {"inverted", "inference"}
    generator : Generator, optional
        Where the masks come from; ``gpu_layers.default_generator`` by default. Each training forward takes one
        offset, whatever p is; evaluation and backward none.

    Raises
    ------
    ValueError
        For p outside [0, 1] or NaN, or an unknown scaling.
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        scaling: str = "inverted",
        generator: random.Generator | None = None,
    ) -> None:
        super().__init__()
        self.p = check_probability(p)
        self.inplace = bool(inplace)
        if scaling not in _SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(map(repr, _SCALINGS))}, got {scaling!r}")
        self.scaling = scaling
        if not (generator is None or isinstance(generator, random.Generator)):
            raise TypeError(f"generator must be a gpu_layers.Generator, got {type(generator).__name__}")
        self.generator = generator

    def forward(self, x: Any) -> Any:
        """Drop in training; the identity (or, with ``scaling="inference"``, ``x * (1 - p)``) in evaluation.

        Parameters
        ----------
        x : array
            Any shape. The result of an identity is x itself.
        """
        out = x if self.inplace else None
        scale = None if self.scaling == "inverted" else 1.0
        saved: DropoutSaved | _IdentitySaved
        if self.training:
            generator = self.generator or random.default_generator
            # The generator is advanced only once the call has succeeded.
            y, saved = dropout_forward(x, self.p, generator.seed, generator.offset, scale=scale, out=out)
            generator.next_offset()
        elif self.scaling == "inverted":
            backend_for(x)
            check_dtype(x)
            y, saved = x, _IdentitySaved(x.shape, x.dtype)
        else:
            y, saved = dropout_forward(x, 0.0, 0, 0, scale=1 - self.p, out=out)
        self._saved = saved
        return y

    def backward(self, dy: Any) -> Any:
        """The mask and scale of the last forward, applied to dy."""
        saved = self._saved_by_forward()
        if isinstance(saved, _IdentitySaved):
            backend_for(dy)
            check_gradient(dy, saved.shape, saved.dtype)
            return dy
        return dropout_backward(dy, saved)

    def _configuration(self) -> str:
        scaling = "" if self.scaling == "inverted" else f", scaling={self.scaling!r}"
        return f"p={self.p}, inplace={self.inplace}{scaling}"
