"""Finding the layers in a model, and setting their modes for a while."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import is_cupy_array
from gpu_layers.layers.base import NO_LAYERS_IN, Layer

#: Objects that refer to nothing, or to so much that searching them would mean searching everything.
_CLOSED = (type, types.ModuleType, str, bytes, bytearray, int, float, complex, bool, type(None), np.ndarray, np.generic)
#: Functions do not show which objects they use.
_CODE = (types.FunctionType, types.BuiltinFunctionType, np.ufunc)


def layers_of(model: object, layers: Iterable[Layer] | None = None) -> list[Layer]:
    """The layers of a model and those within them, each once, in the order in which they are found.

    Parameters
    ----------
    model : Layer or callable
        Searched at any depth: attributes (also of ``__slots__`` and of classes), lists, tuples, sets, deques and dicts;
        the object of a bound method; the function and the arguments of a ``functools.partial``.
    layers : iterable of Layer, optional
        Searched instead: a function does not show which layers it calls.

    Returns
    -------
    list of Layer
        Empty only for a function, or for empty ``layers``.

    Raises
    ------
    ValueError
        If there are none.
    """
    if layers is not None:
        return list(_layers_in(list(layers)))
    found = list(_layers_in(model))
    if not found and not isinstance(_called(model), _CODE):
        raise ValueError(f"found no layer in a model of type {type(model).__name__}: name its layers with layers=")
    return found


def _called(model: object) -> Any:
    """The function that a partial function calls."""
    while isinstance(model, functools.partial):
        model = model.func
    return model


def _layers_in(model: object) -> Iterator[Layer]:
    seen: set[int] = set()
    waiting = [model]
    # Ids are unique among living objects only, and nothing else may hold what a slot or a property returns.
    alive = []
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _CLOSED) or is_cupy_array(one):
            continue
        seen.add(id(one))
        alive.append(one)
        if isinstance(one, Layer):
            yield one
        # The last in is the first out.
        waiting.extend(reversed(list(_parts(one))))


def _parts(one: Array) -> Iterator[Any]:
    """The objects that an object visibly refers to."""
    if isinstance(one, (list, tuple, set, frozenset, deque)):
        yield from one
    elif isinstance(one, (dict, types.MappingProxyType)):
        # Not other mappings: reading one may load a file.
        yield from one.keys()
        yield from one.values()
    elif isinstance(one, functools.partial):
        yield from (one.func, *one.args, *one.keywords.values())
    elif isinstance(one, types.MethodType):
        yield one.__self__
    if isinstance(one, Layer):
        yield from (layer for _, layer in one.named_children())
    if isinstance(one, _CODE):
        return
    attributes = getattr(one, "__dict__", {})
    skipped = NO_LAYERS_IN if isinstance(one, Layer) else ()
    yield from (value for name, value in attributes.items() if name not in skipped)
    for kind in type(one).__mro__:
        if kind.__module__ == "builtins" or issubclass(Layer, kind):
            continue
        for name, value in vars(kind).items():
            if isinstance(value, types.MemberDescriptorType):
                try:
                    yield value.__get__(one)
                except AttributeError:
                    # An empty slot.
                    continue
            elif isinstance(value, (Layer, list, tuple, set, frozenset, dict)) and not name.startswith("__"):
                yield value


@contextmanager
def modes(layers: Iterable[Layer], training: Callable[[Layer], bool]) -> Iterator[None]:
    """Set the mode of these layers, but not of those within them, to ``training(layer)``; restore it afterwards."""
    before = [(layer, layer.training) for layer in layers]
    try:
        for layer, _ in before:
            layer.training = training(layer)
        yield
    finally:
        for layer, mode in before:
            layer.training = mode
