"""Count, mean and sum of squared deviations of values that come in parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import place_of


@dataclass(frozen=True)
class Moments:
    """Moments of the values of each channel.

    Attributes
    ----------
    count : int
        Values per channel.
    mean, squares : array of float64, shape (C,)
        ``squares`` is ``sum (x - mean)^2``.
    """

    count: int
    mean: Array
    squares: Array

    @classmethod
    def of(cls, count: int, mean: Array, var: Array) -> Moments:
        """Moments from a mean and a biased variance of any float dtype.

        Parameters
        ----------
        count : int
            Values per channel.
        mean, var : array, shape (C,)

        Returns
        -------
        Moments
        """
        with place_of(mean):
            return cls(count, mean.astype(np.float64), var.astype(np.float64) * count)

    @property
    def var(self) -> Array:
        """Biased variance."""
        with place_of(self.squares):
            return self.squares / self.count

    @property
    def unbiased_var(self) -> Array:
        """Unbiased variance, of at least 2 values."""
        with place_of(self.squares):
            return self.squares / (self.count - 1)


def merged(parts: Iterable[Moments]) -> Moments | None:
    """The moments of all values, in the order of the parts; None if there are no values.

    Nothing cancels (Chan, Golub and LeVeque, 1979): with ``n = n_a + n_b`` and ``d = mean_b - mean_a``
    ``mean = mean_a + d * n_b / n`` and ``squares = squares_a + squares_b + d^2 * n_a * n_b / n``.
    """
    total: Moments | None = None
    for part in parts:
        if part.count == 0:
            continue
        if total is None:
            total = part
            continue
        count = total.count + part.count
        with place_of(total.mean):
            difference = part.mean - total.mean
            total = Moments(
                count,
                total.mean + difference * (part.count / count),
                total.squares + part.squares + difference * difference * (total.count * part.count / count),
            )
    return total
