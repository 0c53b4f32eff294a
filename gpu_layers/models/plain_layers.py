"""Whether a layer is unchanged from its class: nothing replaced, nothing added. Only then may another replace it."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_layers.core.array import Array
from gpu_layers.layers.base import Layer

#: Attributes that passes leave: another layer never takes them over.
OF_PASSES = frozenset({"gradients", "_saved", "_noted_calls", "_checked_call"})


def is_plain(layer: Layer, types: tuple[type[Layer], ...]) -> bool:
    """Whether a layer is of exactly one of these types, not a subclass, without a replaced method."""
    return type(layer) in types and not replaced_methods(layer)


def replaced_methods(layer: Layer) -> list[str]:
    """Names of methods that were replaced on this layer."""
    return sorted(name for name in vars(layer) if callable(getattr(type(layer), name, None)))


def added_attributes(layer: Layer, fresh: Layer, known: Iterable[str]) -> list[str]:
    """Attributes of a layer that are not known, and so would be lost in another layer.

    Parameters
    ----------
    layer : Layer
    fresh : Layer
        A new layer of the same type: attributes that are equal in both are not lost.
    known : iterable of str
        Attributes that the other layer takes over, or that do not matter.
    """
    known, defaults = OF_PASSES.union(known), vars(fresh)
    return sorted(
        name
        for name, value in vars(layer).items()
        if name not in known and not (name in defaults and _are_equal(value, defaults[name]))
    )


def _are_equal(one: Array, other: Array) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except ValueError:  # arrays
        return False
