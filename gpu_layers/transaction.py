"""The statistics of a training step, folded in for all layers or for none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from gpu_layers.layer_tree import layers_of
from gpu_layers.layers.base import Layer
from gpu_layers.layers.running_statistics import RunningStatisticsLayer
from gpu_layers.snapshot import Snapshot


class _Transaction:
    """A block that is being run: its layers, and how they were before something within it was folded in."""

    def __init__(self, layers: list[RunningStatisticsLayer]) -> None:
        self.layers = layers
        self._before: dict[int, Snapshot] = {}

    def fold_in(self, skip_nonfinite: bool) -> None:
        """Commit what is pending, all of it or, after an exception, none."""
        pending = [layer for layer in self.layers if layer.pending is not None]
        for layer in pending:
            self._before.setdefault(id(layer), Snapshot([layer]))
        _commit(pending, skip_nonfinite)

    def undo(self) -> None:
        """Make what was folded in undone."""
        for snapshot in self._before.values():
            snapshot.restore()

    def hand_over(self, outer: _Transaction) -> None:
        """Have an outer block undo, should it fail, what this one has folded into its layers."""
        for layer in outer.layers:
            if id(layer) in self._before:
                outer._before.setdefault(id(layer), self._before[id(layer)])


_open: ContextVar[tuple[_Transaction, ...]] = ContextVar("gpu_layers_transactions", default=())


@contextmanager
def statistics_transaction(
    model: Callable[..., Any], *, skip_nonfinite: bool = False, layers: Iterable[Layer] | None = None
) -> Iterator[None]:
    """Within the block running statistics wait; at its end all are updated, after an exception none is.

    A forward that is computed again within the block, as recomputation of activations does, counts once: each layer
    keeps what its last forward found.

    Within another such block a block folds in at its own end; should the other one fail, that is undone for the layers
    that both have. What is pending is copied before it is folded in, to be put back if that breaks off half way.

    Parameters
    ----------
    model : Layer or callable
        Layers inside are found in whatever its attributes hold, however deep.
    skip_nonfinite : bool
        Update none if the statistics of any layer hold NaN or infinity; each layer's ``num_batches_skipped`` counts
        that. Decided on the device, without waiting for it.
    layers : iterable of Layer, optional
        The layers to look at, where the model is a function that uses layers: it does not show which.

    Raises
    ------
    ValueError
        For a model that is no function and in which no layer is found.
    RuntimeError
        If the statistics of an earlier forward still wait for ``commit()`` or ``rollback()``.
    """
    found = [layer for layer in layers_of(model, layers) if isinstance(layer, RunningStatisticsLayer)]
    waiting = [layer for layer in found if layer.pending is not None]
    if waiting:
        raise RuntimeError(f"{waiting[0]!r} has statistics pending: commit() or rollback() them first")
    before = [(layer, layer.deferred) for layer in found]
    transaction, enclosing = _Transaction(found), _open.get()
    token = _open.set((*enclosing, transaction))
    try:
        for layer in found:
            layer.deferred = True
        yield
        transaction.fold_in(skip_nonfinite)
    except BaseException:
        transaction.undo()
        raise
    else:
        for outer in enclosing:
            transaction.hand_over(outer)
    finally:
        _open.reset(token)
        for layer, deferred in before:
            layer.rollback()
            layer.deferred = deferred


def _commit(layers: list[RunningStatisticsLayer], skip_nonfinite: bool) -> None:
    accepted: Any = None
    if skip_nonfinite:
        for layer in layers:
            finite = layer.pending_is_finite()
            accepted = finite if accepted is None else accepted & finite
    for layer in layers:
        layer.commit(accepted)
