"""Running statistics that a batch's are folded into: what both floors take."""

from __future__ import annotations

from typing import Any, NamedTuple


class RunningStatistics(NamedTuple):
    """Running averages, and how a batch is folded in: ``running = (1 - momentum) * running + momentum * batch``.

    Attributes
    ----------
    mean, var : array, shape (C,)
        Changed in place; var is of unbiased variances.
    batches : array of int64, of one element
        How many batches are in them; changed in place.
    momentum : float or None
        None: the average of all batches, each counted alike.
    values : int
        Values a channel of the batch.
    """

    mean: Any
    var: Any
    batches: Any
    momentum: float | None
    values: int

    @property
    def arrays(self) -> tuple[Any, Any, Any]:
        """Those that are changed."""
        return self.mean, self.var, self.batches
