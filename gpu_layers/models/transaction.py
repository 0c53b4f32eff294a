"""The statistics of a training step: folded in for all layers or for none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from gpu_layers.core.cuda import place_of
from gpu_layers.layers.base import Layer
from gpu_layers.layers.layer_tree import layers_of
from gpu_layers.layers.running_statistics import RunningStatisticsLayer
from gpu_layers.models.snapshot import Snapshot


class _Transaction:
    """A running block: its layers, and their state before anything was folded in."""

    def __init__(self, layers: list[RunningStatisticsLayer]) -> None:
        self.layers = layers
        self._before: dict[int, Snapshot] = {}

    def fold_in(self, skip_nonfinite: bool) -> None:
        """Commit all pending statistics, or none after an exception."""
        pending = [layer for layer in self.layers if layer.pending is not None]
        for layer in pending:
            self._before.setdefault(id(layer), Snapshot([layer]))
        _commit(pending, skip_nonfinite)

    def undo(self) -> None:
        """Undo what was folded in."""
        for snapshot in self._before.values():
            snapshot.restore()

    def hand_over(self, outer: _Transaction) -> None:
        """If an outer block fails, it undoes what this block has folded into their common layers."""
        for layer in outer.layers:
            if id(layer) in self._before:
                outer._before.setdefault(id(layer), self._before[id(layer)])


_open: ContextVar[tuple[_Transaction, ...]] = ContextVar("gpu_layers_transactions", default=())


@contextmanager
def statistics_transaction(
    model: Callable[..., object], *, skip_nonfinite: bool = False, layers: Iterable[Layer] | None = None
) -> Iterator[None]:
    """Update running statistics at the end of the block: those of all layers, or none after an exception.

    A forward that is computed again within the block, as in activation checkpointing, counts once: each layer keeps the
    statistics of its last forward.

    A block within another one folds in at its own end. If the outer block then fails, that is undone for the layers
    that both have. Running statistics are copied before, and restored if folding in fails half way.

    Parameters
    ----------
    model : Layer or callable
        Layers are found in its attributes, at any depth.
    skip_nonfinite : bool
        Update no layer if the statistics of any layer hold NaN or infinity; ``num_batches_skipped`` of each layer
        counts that. The device decides; nothing waits for it.
    layers : iterable of Layer, optional
        The layers to use, if the model is a function: it does not show which layers it calls.

    Raises
    ------
    ValueError
        For a model that is not a function and holds no layer.
    RuntimeError
        If statistics of an earlier forward are still pending.
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
            with place_of(finite):
                accepted = finite if accepted is None else accepted & finite
    for layer in layers:
        layer.commit(accepted)
