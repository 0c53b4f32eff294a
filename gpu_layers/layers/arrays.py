"""The arrays of a layer and the layers within it, by dotted names, each array once."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import is_cupy_array, place_of


def memory_of(array: Array) -> Hashable:
    """A key that is equal for equal arrays: of the same memory and dtype, each element once, in any order of axes.

    The arrays must live as long as their keys are compared.
    """
    root = getattr(array, "base", None)
    if root is None:
        return id(array)
    while getattr(root, "base", None) is not None:
        root = root.base
    place = _place(array)
    return id(root) if type(root) is type(array) and _place(root) == place else place


def _place(array: Array) -> tuple[Hashable, ...]:
    address = array.data.ptr if is_cupy_array(array) else array.__array_interface__["data"][0]
    axes = _axes(array)
    return address, *(tuple(sizes[axis] for axis in axes) for sizes in (array.shape, array.strides)), array.dtype


def turned(values: Array, owner: Array, other: Array) -> Array:
    """Values that belong to an array, in the axes of another array of the same memory, such as its transpose."""
    here, there = _axes(owner), _axes(other)
    if here == there:
        return values
    return values.transpose(here).transpose([there.index(axis) for axis in range(len(there))])


def _axes(array: Array) -> list[int]:
    """The axes in the order of memory, outermost first."""
    return sorted(range(array.ndim), key=lambda axis: -array.strides[axis])


def added(one: Array, other: Array) -> Array:
    """The sum of two gradients, a new array; None counts as no gradient."""
    if one is None or other is None:
        return one if other is None else other
    with place_of(one):
        return one + other


class LayerArrays(dict[str, Array]):
    """Current parameters, gradients or buffers of a layer and of all layers within.

    The items belong to the layers: assigning to an item assigns to its layer's array. A parameter that several layers
    share, and one of a layer that is held twice, is there once, under its first name; its gradient is the sum.

    Parameters
    ----------
    layer : Layer
    kind : {"parameters", "gradients", "buffers"}
    """

    def __init__(self, layer: Any, kind: str) -> None:
        self._layer, self._kind = layer, kind
        self._owners: dict[str, Any] = {}
        firsts: dict[Hashable, tuple[str, Any]] = {}
        found: dict[str, Array] = {}
        for prefix, one in layer.named_layers():
            own = vars(one)
            for name, array in own[kind].items():
                full = f"{prefix}.{name}" if prefix else name
                owner = own["parameters"].get(name) if kind == "gradients" else array
                first, first_owner = firsts.setdefault(full if owner is None else memory_of(owner), (full, owner))
                if first == full:
                    found[full] = array
                elif kind == "gradients" and array is not None:
                    before = found[first]
                    # A backward of the whole has already added them: then each is the sum.
                    if before is None or memory_of(before) != memory_of(array):
                        found[first] = added(before, turned(array, owner, first_owner))
        super().__init__(found)

    def refreshed(self) -> Array:
        """The same, read again: after a move, or with layers that were added."""
        return getattr(self._layer, self._kind)

    def _place_of(self, name: str) -> tuple[dict[str, Array], str]:
        """The dict for the item, and its name there."""
        own: dict[str, Array] = vars(self._layer)[self._kind]
        if name in own:
            return own, name
        if not self._owners:
            self._owners = dict(self._layer.named_layers(remove_duplicate=False))
        prefix, _, last = name.rpartition(".")
        if prefix not in self._owners:
            raise KeyError(f"there is no layer {prefix!r} for {name!r}")
        return vars(self._owners[prefix])[self._kind], last

    def __setitem__(self, name: str, value: Array) -> None:
        place, last = self._place_of(name)
        place[last] = value
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        place, last = self._place_of(name)
        del place[last]
        super().__delitem__(name)

    def __ior__(self, other: Array) -> LayerArrays:  # type: ignore[override, misc]
        self.update(other)
        return self

    # The methods of dict would change this dict, but no layer.
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault
    pop = MutableMapping.pop
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear

    def copy(self) -> dict[str, Array]:
        """A plain dict of the same arrays."""
        return dict(self)

    def __reduce__(self) -> tuple[object, ...]:
        return dict, (dict(self),)
