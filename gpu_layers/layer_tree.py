"""The layers in a model, and their modes for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from gpu_layers.layers.base import Layer


def layers_of(model: Any, layers: Iterable[Layer] | None = None) -> list[Layer]:
    """The layers of a model and those within these, each once.

    Parameters
    ----------
    model : Layer or callable
        Layers are found in its attributes (in those of the object whose method it is), and in lists and dicts there.
    layers : iterable of Layer, optional
        Where to look instead: what a function uses cannot be seen from it.
    """
    if layers is not None:
        return list(_layers_in(list(layers)))
    owner = getattr(model, "__self__", model)
    return list(_layers_in([owner, *getattr(owner, "__dict__", {}).values()]))


def _layers_in(value: Any) -> Iterator[Layer]:
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Layer):
            yield one
            waiting.extend(vars(one).values())
        elif isinstance(one, (list, tuple)):
            waiting.extend(one)
        elif isinstance(one, dict):
            waiting.extend(one.values())


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
