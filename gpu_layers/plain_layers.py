"""Whether a layer is what its class says, so that another can stand for it: none of it replaced, nothing added."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpu_layers.layers.base import Layer

#: What a layer has from its last passes: never another layer's.
OF_PASSES = frozenset({"gradients", "_saved", "_noted_calls", "_checked_arrays"})


def is_plain(layer: Any, types: tuple[type[Layer], ...]) -> bool:
    """Whether a layer is exactly of one of these types, no subclass, and none of its methods was replaced."""
    return type(layer) in types and not replaced_methods(layer)


def replaced_methods(layer: Layer) -> list[str]:
    """Methods that somebody has put another function in the place of, on this one layer."""
    return sorted(name for name in vars(layer) if callable(getattr(type(layer), name, None)))


def added_attributes(layer: Layer, fresh: Layer, known: Iterable[str]) -> list[str]:
    """Attributes that a layer would lose to whoever takes over only those that are known.

    Parameters
    ----------
    layer : Layer
    fresh : Layer
        Of the same type, as it is made: what ``layer`` has like this one is not lost.
    known : iterable of str
        Attributes that are taken over, or do not matter.
    """
    known, defaults = OF_PASSES.union(known), vars(fresh)
    return sorted(
        name
        for name, value in vars(layer).items()
        if name not in known and not (name in defaults and _are_equal(value, defaults[name]))
    )


def _are_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except ValueError:  # arrays
        return False
