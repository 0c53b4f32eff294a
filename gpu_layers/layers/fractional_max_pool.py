"""Fractional max pooling layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_layers import random
from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_number
from gpu_layers.layers.draws import check_generator, drawn
from gpu_layers.layers.pool_base import Pool
from gpu_layers.ops.fractional_max_pool import (
    fractional_max_pool_backward,
    fractional_max_pool_forward,
    fractional_max_pool_indices,
)
from gpu_layers.ops.pool_arguments import PerAxis, per_axis, spatial_shape
from gpu_layers.runtime.backend import backend_for

__all__ = ["FractionalMaxPool2d", "FractionalMaxPool3d"]


class _FractionalMaxPool(Pool):
    """Largest value of each window, of windows whose overlap is random (Graham, 2014): sizes shrink by any ratio.

    Parameters
    ----------
    kernel_size : int or tuple of int
        One for all spatial axes, or one per axis; at most 256 elements in all.
    output_size : int or tuple of int, optional
    output_ratio : float or tuple of float, optional
        Of the output's size to the input's, between 0 and 1: instead of a size.
    return_indices : bool
        Whether forward also returns the flat index in the input plane of each maximum (int64).
    channels_last : bool
        Input is (N, *spatial, C) instead of (N, C, *spatial).
    generator : Generator, optional
        Where the windows come from, as the masks of :class:`Dropout`; each forward without samples takes one offset, in
        evaluation too, as in PyTorch.

    Raises
    ------
    TypeError, ValueError
        For numbers that make no window, both an output size and a ratio, or neither.
    """

    _gradient = staticmethod(fractional_max_pool_backward)

    def __init__(
        self,
        kernel_size: PerAxis,
        output_size: PerAxis | None = None,
        output_ratio: float | Sequence[float] | None = None,
        return_indices: bool = False,
        *,
        channels_last: bool = False,
        generator: random.Generator | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if output_size is None and output_ratio is None:
            raise ValueError(f"{name} requires specifying either an output size, or a pooling ratio")
        if output_size is not None and output_ratio is not None:
            raise ValueError("only one of output_size and output_ratio may be specified")
        self.kernel_size, self.output_size, self.output_ratio = kernel_size, output_size, output_ratio
        self.return_indices, self.channels_last = bool(return_indices), bool(channels_last)
        self.generator = check_generator(generator)
        self._kernel = per_axis(kernel_size, self._rank, "kernel_size")
        self._sizes = None if output_size is None else per_axis(output_size, self._rank, "output_size")
        self._ratios = None if output_ratio is None else self._checked_ratios(output_ratio)
        for what, sizes in (("kernel_size", self._kernel), ("output_size", self._sizes or (1,))):
            if min(sizes) < 1:
                raise ValueError(f"{what} should be greater than zero, got {list(sizes)}")
        self._taken: Array = None
        self._taken_again: tuple[Any, ...] = ()

    def _checked_ratios(self, ratio: object) -> tuple[float, ...]:
        ratios = tuple(ratio) if isinstance(ratio, (tuple, list)) else (ratio,) * self._rank
        if len(ratios) != self._rank:
            raise ValueError(f"output_ratio must be a number, or {self._rank} of them, one a spatial axis, got {ratio}")
        numbers = tuple(check_number(one, "output_ratio") for one in ratios)
        if not all(0 < one < 1 for one in numbers):
            raise ValueError(f"output_ratio must be between 0 and 1 (got {ratio})")
        return numbers

    def forward(self, x: Array, samples: Array = None) -> Array:
        """Pool a batch, or one sample without its batch axis.

        Parameters
        ----------
        x : array, shape (N, C, *spatial), or (N, *spatial, C) if channels_last; N may be missing
        samples : array, shape (N, C, axes), optional
            Numbers in [0, 1) that the windows follow from, as PyTorch's ``_random_samples``; see
            :func:`gpu_layers.ops.fractional_max_pool_forward`. No offset is taken then.

        Returns
        -------
        y : array
        indices : array of int64
            Only if return_indices.

        Raises
        ------
        TypeError, ValueError
            For an input or samples that do not fit; the generator then stays where it was.
        """
        sizes = self._output_size(x) if self._sizes is None else self._sizes
        options = {"channels_last": self.channels_last}
        if samples is not None:
            y, self._saved = fractional_max_pool_forward(x, self._kernel, sizes, samples=samples, **options)
        else:
            (y, self._saved), _ = drawn(self, fractional_max_pool_forward, x, self._kernel, sizes, **options)
        return (y, fractional_max_pool_indices(self._saved)) if self.return_indices else y

    def _output_size(self, x: Array) -> tuple[int, ...]:
        backend_for(x)  # which only takes arrays
        _, spatial = spatial_shape(x, self._rank, self.channels_last)
        return tuple(int(size * ratio) for size, ratio in zip(spatial, self._ratios or (), strict=True))

    def _configuration(self) -> str:
        size = f"output_ratio={self.output_ratio}" if self.output_size is None else f"output_size={self.output_size}"
        return f"kernel_size={self.kernel_size}, {size}{', channels_last=True' if self.channels_last else ''}"


class FractionalMaxPool2d(_FractionalMaxPool):
    _rank = 2


class FractionalMaxPool3d(_FractionalMaxPool):
    _rank = 3
