"""Layers in a row."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, overload

from gpu_layers.core.array import Array, ArrayLike
from gpu_layers.layers.base import Layer

__all__ = ["Sequential"]


class Sequential(Layer):
    """Layers applied one after the other, themselves a layer.

    As ``torch.nn.Sequential``: names of parameters, gradients and buffers begin with the layer's position,
    ``"0.weight"``, or with its name in a mapping. ``network[0]`` is a layer; ``network[1:3]`` is a Sequential of the
    same layers under the same names. ``len`` and iteration go over the layers. A layer may be there several times.

    Parameters
    ----------
    *layers : Layer, or one mapping of str to Layer

    Raises
    ------
    TypeError
        If one is not a layer.
    ValueError
        If a name is empty or has a dot.

    Examples
    --------
    >>> import numpy as np
    >>> import gpu_layers as gl
    >>> from gpu_layers.training import SGD
    >>> network = gl.Sequential(gl.Linear(4, 3), gl.ReLU(), gl.Dropout(0.5), gl.Linear(3, 2))
    >>> optimizer = SGD(network.parameters, lr=0.1)
    >>> y = network(np.ones((5, 4), np.float32))
    >>> dx = network.backward(np.ones_like(y))
    >>> optimizer.step(network.gradients)
    """

    _unnamed_holder = "_layers"

    def __init__(self, *layers: Layer | Mapping[str, Layer]) -> None:
        super().__init__()
        if len(layers) == 1 and isinstance(layers[0], Mapping):
            named: dict[str, Any] = {str(name): layer for name, layer in layers[0].items()}
        else:
            named = {str(position): layer for position, layer in enumerate(layers)}
        for name, layer in named.items():
            if not name or "." in name:
                raise ValueError(f"the name of a layer must have characters and no dot, got {name!r}")
            _check_layer(layer)
        self._layers: dict[str, Layer] = named

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers in their order."""
        return tuple(self._layers.values())

    def forward(
        self, x: Array, *, sample_ids: Array = None, lengths: ArrayLike | None = None, mask: Array = None
    ) -> Array:
        """The last layer's output.

        Parameters
        ----------
        x : array
        sample_ids, lengths, mask : optional
            Passed on to the layers whose forward has an argument of this name: see :class:`Dropout`,
            :class:`BatchNorm2d` and :class:`MaxPool2d`.

        Returns
        -------
        array

        Raises
        ------
        TypeError
            If no layer takes one of these arguments; also whatever the layers raise.
        ValueError
            If lengths or a mask would reach a layer after the spatial size has changed: they belong to x.
        """
        options = {"sample_ids": sample_ids, "lengths": lengths, "mask": mask}
        options = {name: value for name, value in options.items() if value is not None}
        for name in options:
            if not _takes(self, name):
                raise TypeError(f"no layer of this Sequential takes {name}")
        size = x.shape if options else ()
        for name, layer in self._layers.items():
            taken = {option: value for option, value in options.items() if _takes(layer, option)}
            if taken.keys() - {"sample_ids"} and _without_channels(layer, x.shape) != _without_channels(layer, size):
                raise ValueError(
                    f"lengths and mask belong to the input of shape {list(size)}, but layer {name}, {layer!r}, got an "
                    f"input of shape {list(x.shape)}: call the layers one by one, with lengths for each"
                )
            x = layer(x, **taken)
        return x

    def backward(self, dy: Array) -> Array:
        """Gradient of x; assigns the gradients of every layer.

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
        TypeError, ValueError, RuntimeError
            Whatever the backwards of the layers raise.
        """
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def append(self, layer: Layer) -> Sequential:
        """Add a layer at the end.

        Parameters
        ----------
        layer : Layer

        Returns
        -------
        Sequential
            This one.

        Raises
        ------
        TypeError
            If it is not a layer.
        """
        _check_layer(layer)
        number = len(self._layers)
        # A slice keeps the names of the whole: its length may be the name of one of its layers.
        while str(number) in self._layers:
            number += 1
        self._layers[str(number)] = layer
        return self

    def extend(self, layers: Iterable[Layer]) -> Sequential:
        """Add layers at the end.

        Parameters
        ----------
        layers : iterable of Layer

        Returns
        -------
        Sequential
            This one.

        Raises
        ------
        TypeError
            If one is not a layer; those before it have been added.
        """
        for layer in layers:
            self.append(layer)
        return self

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequential:
        if isinstance(index, slice):
            part = Sequential(dict(list(self._layers.items())[index]))
            part.training = self.training
            return part
        return self._layers[self._name_at(index)]

    def __setitem__(self, index: int, layer: Layer) -> None:
        _check_layer(layer)
        self._layers[self._name_at(index)] = layer

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    # An empty Sequential is a layer too.
    def __bool__(self) -> bool:
        return True

    def _name_at(self, index: int) -> str:
        position, names = operator.index(index), list(self._layers)
        if not -len(names) <= position < len(names):
            raise IndexError(f"index {position} is out of range")
        return names[position]


def _check_layer(layer: object) -> None:
    if not isinstance(layer, Layer):
        raise TypeError(f"expected a Layer, got {type(layer).__name__}")


def _takes(layer: Layer, option: str) -> bool:
    if isinstance(layer, Sequential):
        return any(_takes(one, option) for one in layer)
    parameters = inspect.signature(layer.forward).parameters
    return option in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _without_channels(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1] if getattr(layer, "channels_last", False) else (*shape[:1], *shape[2:])
