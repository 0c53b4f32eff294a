"""Dropout layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from gpu_layers import random
from gpu_layers.core.array import Array
from gpu_layers.layers.base import Layer
from gpu_layers.layers.draws import check_generator, drawn
from gpu_layers.ops.checks import check_dtype, check_gradient, check_probability
from gpu_layers.ops.dropout import (
    DropoutSaved,
    alpha_dropout_forward,
    check_sample_ids,
    check_shared_axes,
    dropout_backward,
    dropout_forward,
)
from gpu_layers.runtime.backend import backend_for

__all__ = ["AlphaDropout", "DropPath", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"]

_SCALINGS = ("inverted", "inference")


@dataclass(frozen=True)
class _IdentitySaved:
    """What the backward of an identity needs to check dy."""

    shape: tuple[int, ...]
    dtype: np.dtype


def first_decision(x: Array, first_sample: int, mask_axes: int | None = None, shared_axes: Sequence[int] = ()) -> int:
    """Number of x's first decision, if its first sample has the number ``first_sample`` in the whole batch."""
    if first_sample == 0:
        return 0
    backend_for(x)
    shared = check_shared_axes(shared_axes, x.ndim)
    if 0 in shared:
        return 0
    return first_sample * math.prod(size for axis, size in enumerate(x.shape[:mask_axes]) if axis not in (0, *shared))


class DropoutLayer(Layer):
    """What all dropout layers share: p, generator, and the identity in evaluation.

    Subclasses say how many leading axes the mask has: elements that agree in them are dropped together.

    Attributes
    ----------
    first_sample : int
        Number of the input's first sample in the batch, if the input is a part of a batch. Each part then gets the
        masks that it would get in the whole batch. 0 at first.
    """

    shared_axes: tuple[int, ...] = ()
    _operation: Callable[..., Any] = staticmethod(dropout_forward)

    def __init__(self, p: float = 0.5, inplace: bool = False, *, generator: random.Generator | None = None) -> None:
        super().__init__()
        self.p = check_probability(p)
        self.inplace = bool(inplace)
        self.generator = check_generator(generator)
        self.first_sample = 0
        self._taken: Array = None
        self._taken_again: tuple[Any, ...] = ()

    def forward(self, x: Array) -> Array:
        """Drop in training; return x itself in evaluation.

        Parameters
        ----------
        x : array
            float16, bfloat16, float32 or float64.

        Returns
        -------
        array
            x's shape and dtype.

        Raises
        ------
        TypeError, ValueError
            For a wrong array type, dtype or rank; the generator then stays as it was.
        """
        return self._forward(x)

    def _forward(self, x: Array, **options: object) -> Array:
        saved: DropoutSaved | _IdentitySaved
        if self.training:
            mask_axes = options["mask_axes"] = self._mask_axes(x)
            # Sample ids are already those of the whole batch.
            if self.first_sample and options.get("sample_ids") is None:
                options["start"] = first_decision(x, self.first_sample, mask_axes, self.shared_axes)
            if self.inplace:
                options["out"] = x
            (y, drawn_mask), taken = drawn(self, self._operation, x, self.p, **options)
            saved = drawn_mask if taken is None else drawn_mask.with_rng_state(taken)
        else:
            backend_for(x)
            check_dtype(x)
            self._mask_axes(x)
            y, saved = self._evaluate(x)
        vars(self)["_saved"] = saved
        return y

    def backward(self, dy: Array) -> Array:
        """Apply the mask and scale of the last forward to dy.

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
            Before any forward, or if a later call has overwritten the numbers of a :class:`CudaGraphGenerator`.
        """
        saved = self._saved_by_forward()
        if isinstance(saved, _IdentitySaved):
            backend_for(dy)
            check_gradient(dy, saved.shape, saved.dtype)
            return dy
        return dropout_backward(dy, saved)

    def _evaluate(self, x: Array) -> tuple[Array, DropoutSaved | _IdentitySaved]:
        return x, _IdentitySaved(x.shape, x.dtype)

    def _mask_axes(self, x: Array) -> int | None:
        """Leading axes of the mask, None for all. TypeError unless x is a float array, ValueError for a wrong rank."""
        return None

    def _configuration(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class Dropout(DropoutLayer):
    """Drop each element with probability p in training.

    With ``scaling="inverted"`` kept elements are divided by ``1 - p``: the expectation is the input, and evaluation is
    the identity. With ``scaling="inference"`` (Srivastava et al., 2014) kept elements stay as they are, and evaluation
    multiplies by ``1 - p``.

    Parameters
    ----------
    p : float
        In [0, 1].
    inplace : bool
        Write the output into the input.
    scaling : {"inverted", "inference"}
    shared_axes : sequence of int
        Axes along which elements are dropped together, from the end if negative: 1 for one mask for all steps of
        ``(N, T, C)``, 0 for one mask for the batch.
    generator : Generator, optional
        Source of the masks; ``gpu_layers.default_generator`` by default. Each training forward takes one offset,
        whatever p is. Evaluation and backward take none.

    Raises
    ------
    TypeError
        If shared_axes are not integers.
    ValueError
        For p outside [0, 1] or NaN, an unknown scaling, or an axis that comes twice.
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        scaling: str = "inverted",
        shared_axes: Sequence[int] = (),
        generator: random.Generator | None = None,
    ) -> None:
        super().__init__(p, inplace, generator=generator)
        if scaling not in _SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(map(repr, _SCALINGS))}, got {scaling!r}")
        self.scaling, self.shared_axes = scaling, check_shared_axes(shared_axes)

    def forward(self, x: Array, sample_ids: Array = None) -> Array:
        """Drop in training; the identity (or, with ``scaling="inference"``, ``x * (1 - p)``) in evaluation.

        Parameters
        ----------
        x : array
            Any shape.
        sample_ids : array of int64, shape (x.shape[0],), optional
            Number of each row. The row's mask then depends on this number instead of the row's place in the batch; see
            :func:`gpu_layers.ops.dropout_forward`.

        Returns
        -------
        array
            x's shape and dtype; x itself if it is not changed, or inplace.

        Raises
        ------
        TypeError, ValueError
            For a wrong array type or dtype, or sample_ids that do not fit; the generator then stays as it was.
        """
        if sample_ids is not None:
            backend_for(x, sample_ids)
            check_sample_ids(sample_ids, x)
        scale = None if self.scaling == "inverted" else 1.0
        return self._forward(x, scale=scale, shared_axes=self.shared_axes, sample_ids=sample_ids)

    def _mask_axes(self, x: Array) -> int | None:
        if self.shared_axes:
            check_shared_axes(self.shared_axes, _rank_of(x))
        return None

    def _evaluate(self, x: Array) -> tuple[Array, DropoutSaved | _IdentitySaved]:
        if self.scaling == "inverted":
            return super()._evaluate(x)
        return dropout_forward(x, 0.0, 0, 0, scale=1 - self.p, out=x if self.inplace else None)

    def _configuration(self) -> str:
        scaling = "" if self.scaling == "inverted" else f", scaling={self.scaling!r}"
        shared = f", shared_axes={self.shared_axes}" if self.shared_axes else ""
        return super()._configuration() + scaling + shared


_PARAMETERS = """

    Parameters
    ----------
    p : float
        In [0, 1].
    inplace : bool
        Write the output into the input.
    generator : Generator, optional
        Source of the masks, as in :class:`Dropout`.

    Raises
    ------
    ValueError
        For p outside [0, 1] or NaN.
    """


def _rank_of(x: Array) -> int:
    """Number of axes. TypeError unless x is a float array."""
    backend_for(x)
    check_dtype(x)
    return int(x.ndim)


class _ChannelDropout(DropoutLayer):
    """Drop whole channels. The mask has the axes before the spatial ones: ``(N, C)``, or ``(C,)`` for one sample."""

    _mask_axes_of_rank: ClassVar[dict[int, int]]

    def _mask_axes(self, x: Array) -> int | None:
        rank = _rank_of(x)
        if rank not in self._mask_axes_of_rank:
            fewer, more = self._mask_axes_of_rank
            raise ValueError(
                f"{type(self).__name__.lower()}: Expected {fewer}D or {more}D input, but received a {rank}D input"
            )
        return self._mask_axes_of_rank[rank]


class Dropout1d(_ChannelDropout):
    __doc__ = "Drop whole channels of ``(N, C, L)`` or ``(C, L)`` input." + _PARAMETERS
    _mask_axes_of_rank: ClassVar = {2: 1, 3: 2}


class Dropout2d(_ChannelDropout):
    __doc__ = (
        "Drop whole channels of ``(N, C, H, W)`` input. A 3-D input is ``(N, C, L)``, as in PyTorch, which warns of it."
        "\n    :class:`Dropout1d` is clearer there." + _PARAMETERS
    )
    _mask_axes_of_rank: ClassVar = {3: 2, 4: 2}


class Dropout3d(_ChannelDropout):
    __doc__ = "Drop whole channels of ``(N, C, D, H, W)`` or ``(C, D, H, W)`` input." + _PARAMETERS
    _mask_axes_of_rank: ClassVar = {4: 1, 5: 2}


class AlphaDropout(DropoutLayer):
    __doc__ = (
        "Dropout for SELU networks: keeps mean 0 and variance 1; see :func:`gpu_layers.ops.alpha_dropout_forward`."
        + _PARAMETERS
    )
    _operation = staticmethod(alpha_dropout_forward)


class FeatureAlphaDropout(AlphaDropout):
    __doc__ = "Alpha dropout of whole channels of ``(N, C, ...)`` input." + _PARAMETERS

    def _mask_axes(self, x: Array) -> int | None:
        if _rank_of(x) < 2:
            raise ValueError("Feature dropout requires at least 2 dimensions in the input")
        return 2


class DropPath(DropoutLayer):
    """Drop whole samples (indices of axis 0), divide the others by ``1 - p`` (stochastic depth).

    Parameters
    ----------
    p : float
        In [0, 1].
    generator : Generator, optional
        Source of the masks, as in :class:`Dropout`.

    Raises
    ------
    ValueError
        For p outside [0, 1] or NaN.
    """

    def __init__(self, p: float = 0.0, *, generator: random.Generator | None = None) -> None:
        super().__init__(p, generator=generator)

    def _mask_axes(self, x: Array) -> int | None:
        if _rank_of(x) < 1:
            raise ValueError("DropPath requires at least 1 dimension in the input")
        return 1

    def _configuration(self) -> str:
        return f"p={self.p}"
