"""The layers in a model, and their modes for a while."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpu_layers.layers.base import NO_LAYERS_IN, Layer
from gpu_layers.runtime.cuda import is_cupy_array

#: What refers to so much that looking into it would be looking everywhere, or to nothing.
_CLOSED = (type, types.ModuleType, str, bytes, bytearray, int, float, complex, bool, type(None), np.ndarray, np.generic)
#: Functions show neither what they use nor what that refers to.
_CODE = (types.FunctionType, types.BuiltinFunctionType, np.ufunc)


def layers_of(model: Any, layers: Iterable[Layer] | None = None) -> list[Layer]:
    """The layers of a model and those within these, each once, in the order in which they are found.

    Parameters
    ----------
    model : Layer or callable
        Looked through, however deep: attributes (those of ``__slots__`` and of classes too), lists, tuples, sets,
        deques and dicts; the object whose method it is; the function and the arguments of a ``functools.partial``.
    layers : iterable of Layer, optional
        Where to look instead: what a function uses cannot be seen from it.

    Returns
    -------
    list of Layer
        Empty only for a function, which shows none, or for empty ``layers``.

    Raises
    ------
    ValueError
        If there is none.
    """
    if layers is not None:
        return list(_layers_in(list(layers)))
    found = list(_layers_in(model))
    if not found and not isinstance(_called(model), _CODE):
        raise ValueError(f"found no layer in a model of type {type(model).__name__}: name its layers with layers=")
    return found


def _called(model: Any) -> Any:
    """What runs when a partial function is called."""
    while isinstance(model, functools.partial):
        model = model.func
    return model


def _layers_in(model: Any) -> Iterator[Layer]:
    seen: set[int] = set()
    waiting = [model]
    # Ids are those of living objects only; what a __slots__ or a property gives may be nobody else's.
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


def _parts(one: Any) -> Iterator[Any]:
    """What an object refers to, as far as it shows."""
    if isinstance(one, (list, tuple, set, frozenset, deque)):
        yield from one
    elif isinstance(one, (dict, types.MappingProxyType)):
        # No other mappings: reading one may be loading a file.
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
                    # A slot that nothing was put into.
                    continue
            elif isinstance(value, (Layer, list, tuple, set, frozenset, dict)) and not name.startswith("__"):
                yield value


@contextmanager
def modes(layers: Iterable[Layer], training: Callable[[Layer], bool]) -> Iterator[None]:
    """Put these layers, and none within them, into the mode that ``training`` says; back afterwards."""
    before = [(layer, layer.training) for layer in layers]
    try:
        for layer, _ in before:
            layer.training = training(layer)
        yield
    finally:
        for layer, mode in before:
            layer.training = mode
