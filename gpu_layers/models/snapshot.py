"""The state of layers, to restore after a failure."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_layers.core.array import Array
from gpu_layers.layers.base import Layer
from gpu_layers.layers.running_statistics import RunningStatisticsLayer
from gpu_layers.runtime.copying import overwrite, own_copy


class Snapshot:
    """Copies of the buffers of layers, and their counts of skipped batches.

    Parameters
    ----------
    layers : iterable of Layer
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._kept = [_Kept(layer) for layer in layers]

    def restore(self) -> None:
        """Restore everything: the same arrays, with their old values."""
        for kept in self._kept:
            kept.restore()


class _Kept:
    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._buffers = [(name, value, own_copy(value)) for name, value in layer.buffers.items()]
        self._skipped: Array = layer._skipped if isinstance(layer, RunningStatisticsLayer) else None
        self._count = None if self._skipped is None else own_copy(self._skipped)

    def restore(self) -> None:
        if isinstance(self._layer, RunningStatisticsLayer):
            self._layer._skipped = self._skipped
            if self._skipped is not None:
                overwrite(self._skipped, self._count)
        buffers = self._layer.buffers
        for name in buffers.keys() - {name for name, _, _ in self._buffers}:
            del buffers[name]
        for name, array, value in self._buffers:
            buffers[name] = array
            # An array that cannot be written to has not changed.
            if getattr(array.flags, "writeable", True):
                overwrite(array, value)
