"""The statistics of a training step, folded in for all layers or for none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from gpu_layers.layer_tree import layers_of
from gpu_layers.layers.base import Layer
from gpu_layers.layers.running_statistics import RunningStatisticsLayer


@contextmanager
def statistics_transaction(
    model: Callable[..., Any], *, skip_nonfinite: bool = False, layers: Iterable[Layer] | None = None
) -> Iterator[None]:
    """Within the block running statistics wait; at its end all are updated, after an exception none is.

    A forward that is computed again within the block, as recomputation of activations does, counts once: each layer
    keeps what its last forward found.

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
    try:
        for layer in found:
            layer.deferred = True
        yield
        _commit([layer for layer in found if layer.pending is not None], skip_nonfinite)
    finally:
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
