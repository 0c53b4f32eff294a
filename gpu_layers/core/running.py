"""Running statistics into which those of a batch are folded: an argument of both backends."""

from __future__ import annotations

from typing import NamedTuple

from gpu_layers.core.array import Array


class RunningStatistics(NamedTuple):
    """Running averages, and how a batch is folded in: ``running = (1 - momentum) * running + momentum * batch``.

    Attributes
    ----------
    mean, var : array, shape (C,)
        Changed in place; var averages unbiased variances.
    batches : array of int64, of one element
        Number of batches in them; changed in place.
    momentum : float or None
        None gives all batches the same weight.
    values : int, or array of float64, shape ()
        Values per channel in the batch.
    skipped : array of int64, of one element, optional
        Counts the batches that are not taken; changed in place.
    finite_only : bool
        Whether a batch is taken only if all of its means and variances are finite.
    """

    mean: Array
    var: Array
    batches: Array
    momentum: float | None
    values: Array
    skipped: Array | None = None
    finite_only: bool = False

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array | None]:
        """The arrays that are changed."""
        return self.mean, self.var, self.batches, self.skipped
