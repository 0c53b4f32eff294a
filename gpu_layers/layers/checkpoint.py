"""Layers whose forward runs again in backward, so that nothing between them is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.core.writes import check_unwritten, write_count
from gpu_layers.layers.base import Layer
from gpu_layers.layers.calls import forget_calls
from gpu_layers.layers.layer_tree import modes
from gpu_layers.layers.running_statistics import RunningStatisticsLayer
from gpu_layers.layers.sequential import Sequential
from gpu_layers.random import CallRecord

__all__ = ["Checkpoint"]


class Checkpoint(Sequential):
    """A :class:`Sequential` that keeps only its input; see :func:`checkpoint`.

    Parameters
    ----------
    *layers : Layer, or one mapping of str to Layer

    Raises
    ------
    TypeError, ValueError
        As :class:`Sequential`.
    """

    def forward(self, x: Array, **options: Any) -> Array:
        """As :meth:`Sequential.forward`, but what the layers save for backward is dropped.

        Parameters
        ----------
        x : array
        **options
            As in :meth:`Sequential.forward`.

        Returns
        -------
        array

        Raises
        ------
        ValueError
            For a batch norm that updates the running statistics by which it normalises: they would differ when the
            forward runs again.
        TypeError
            As :meth:`Sequential.forward`.
        """
        layers = [layer for _, layer in self.named_layers() if layer is not self]
        for layer in layers:
            if isinstance(layer, RunningStatisticsLayer) and layer._updates() and not layer._uses_batch():
                raise ValueError(f"{layer!r} normalises by statistics that it updates: its forward cannot be run again")
        record, before = CallRecord(), write_count()
        with record.noting():
            y = super().forward(x, **options)
        forget_calls()
        _forget(layers)
        self._saved = (x, options, [(layer, layer.training) for layer in layers], record, before, write_count())
        return y

    def backward(self, dy: Array) -> Array:
        """Gradient of x; assigns the gradients of every layer. It runs the forward again, with its modes and masks.

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
        RuntimeError
            Before any forward, or if this library has written since to x, to a parameter, or to the numbers of a mask.
        """
        x, options, in_modes, record, before, after = self._saved_by_forward()
        # x and parameters since before the forward, as a layer may have worked in place; masks since the forward.
        check_unwritten(before, x=x, **self.parameters)
        for rng_state in record.draws:
            check_unwritten(after, rng_state=rng_state)
        layers = [layer for layer, _ in in_modes]
        by_layer = {id(layer): training for layer, training in in_modes}
        forget_calls()
        with record.again(), modes(layers, lambda layer: by_layer[id(layer)]), _statistics_kept(layers):
            super().forward(x, **options)
        dx = super().backward(dy)
        forget_calls()
        _forget(layers)
        return dx


def checkpoint(layers: Layer | Iterable[Layer]) -> Checkpoint:
    """The same function, which keeps only its input for backward; backward runs the forward again.

    This trades time for memory: a row of layers keeps one array, not one for each layer. The masks of dropout are the
    same and take no further offsets. Only the first run updates running statistics. The layers are the same objects,
    with their parameters, generators and modes.

    Parameters
    ----------
    layers : Sequential, Layer, or iterable of Layer
        A Sequential keeps the names of its layers, and so of their parameters.

    Returns
    -------
    Checkpoint
        A Sequential, in the mode of the layers. It may be anywhere a layer may be: in a Sequential, in a layer of your
        own, in a captured step. Fuse layers before: ``checkpoint(fuse(sequential))``.

    Raises
    ------
    TypeError
        If one is not a layer, or is of a subclass of Sequential.

    Examples
    --------
    >>> import numpy as np
    >>> import gpu_layers as gl
    >>> block = gl.checkpoint([gl.Linear(4, 4), gl.ReLU(), gl.Dropout(0.5), gl.Linear(4, 4)])
    >>> network = gl.Sequential(block, gl.ReLU())
    >>> dx = network.backward(network(np.ones((3, 4), np.float32)))
    """
    if type(layers) is Sequential:
        result = Checkpoint(dict(layers._layers))
        result.training = layers.training
        return result
    if isinstance(layers, Sequential):
        raise TypeError(f"expected a Sequential or layers, got {type(layers).__name__}, whose forward may be another")
    row = [layers] if isinstance(layers, Layer) else list(layers)
    result = Checkpoint(*row)
    result.training = all(layer.training for layer in row)
    return result


def _forget(layers: Iterable[Layer]) -> None:
    """Drop what layers saved in their last forward."""
    for layer in layers:
        layer._saved = None


@contextmanager
def _statistics_kept(layers: Iterable[Layer]) -> Iterator[None]:
    """Within the block running statistics are not updated."""
    before = [(layer, layer._update_statistics) for layer in layers if isinstance(layer, RunningStatisticsLayer)]
    try:
        for layer, _ in before:
            layer._update_statistics = False
        yield
    finally:
        for layer, update in before:
            layer._update_statistics = update
