"""What each call of a layer saved, so that one layer may be called several times within another.

A forward of a layer overwrites what its last forward saved. So if a layer calls others, every call within its forward
is noted, with what it saved. During its backward, the part of each call is put back before the backward of that call,
the last call first, and the gradients of a layer's calls are added.

The notes belong to the last forward and are dropped with it. They hold what the same number of separate layers would
hold. The forward or backward that is running is known for each thread (and task) separately.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

from gpu_layers.core.array import Array
from gpu_layers.layers.arrays import added, memory_of, turned

if TYPE_CHECKING:
    from gpu_layers.layers.base import Layer

#: What a call of a layer has saved, by the attributes' names.
Saved: TypeAlias = dict[str, Any]


class Calls(Enum):
    """Replaces the calls of a layer if they are of no use."""

    #: An exception ended the forward after it had called other layers: what they saved belongs to two forwards.
    INTERRUPTED = "interrupted"


class _Pass:
    """A forward or backward that is running.

    Attributes
    ----------
    layer, inside : Layer
        The layer of the pass, and the layer that is working now: its own ``super().forward`` is not another call.
    within : _Pass or None
        The pass that called this one.
    calls : list of (Layer, dict)
        Finished forwards, and what each saved.
    """

    __slots__ = ("calls", "inside", "layer", "within")

    def __init__(self, layer: Layer, within: _Pass | None) -> None:
        self.layer = self.inside = layer
        self.within = within
        self.calls: list[tuple[Layer, Saved]] = []

    def note(self, layer: Layer, saved: Saved) -> None:
        """Note that a call of this layer has ended, and what it saved."""
        self.calls.append((layer, saved))


class _Forward(_Pass):
    """A forward; the layer's backward replays its calls."""

    __slots__ = ()

    def note(self, layer: Layer, saved: Saved) -> None:
        if not self.calls:
            # From here on the calls of the last forward are out of date; this frees their memory.
            vars(self.layer)["_noted_calls"] = Calls.INTERRUPTED
        self.calls.append((layer, saved))

    def replace(self, layer: Layer, saved: Saved | None) -> None:
        """Replace what the last call of this layer saved, or drop it."""
        for index in range(len(self.calls) - 1, -1, -1):
            if self.calls[index][0] is layer:
                self.calls[index : index + 1] = [] if saved is None else [(layer, saved)]
                return


class _Backward(_Pass):
    """A backward: it hands out what each call saved, and adds gradients.

    Attributes
    ----------
    totals : dict of int to (Layer, dict)
        The gradients of each layer that had a backward within this one, added over its calls.
    before : list of (Layer, dict) or None
        Gradients of an earlier backward, restored if this one fails before it has any.
    """

    __slots__ = ("_chosen", "_noted", "_waiting", "before", "totals")

    def __init__(self, layer: Layer, within: _Pass | None, calls: list[tuple[Layer, Saved]]) -> None:
        super().__init__(layer, within)
        self._waiting: dict[int, list[Saved]] = {}
        self._noted: dict[int, int] = {}
        self._chosen: set[int] = set()
        self.totals: dict[int, tuple[Layer, dict[str, Array]]] = {}
        self.before: list[tuple[Layer, Saved]] | None = None
        # These references keep the layers alive, whose ids are used.
        for called, saved in calls:
            self.note(called, saved)

    def note(self, layer: Layer, saved: Saved) -> None:
        # Also for a forward that runs again in backward: the next backward of its layer is that of this call.
        self.calls.append((layer, saved))
        self._waiting.setdefault(id(layer), []).append(saved)
        self._noted[id(layer)] = self._noted.get(id(layer), 0) + 1

    def forget(self) -> None:
        """The calls noted so far have no backward: they are made again."""
        self._waiting.clear()
        self._noted.clear()

    def choose(self, layer: Layer) -> None:
        """The next backward of this layer uses what the caller assigned."""
        self._chosen.add(id(layer))

    def next_saved(self, layer: Layer) -> Saved | None:
        """What the call saved whose backward is next; None for a layer that the forward did not call.

        A layer's only call may have its backward several times, for parts of dy.
        """
        if self._chosen and id(layer) in self._chosen:
            self._chosen.remove(id(layer))
            return None
        waiting = self._waiting.get(id(layer))
        if waiting is None:
            return None
        if self._noted[id(layer)] == 1:
            return waiting[0]
        if not waiting:
            raise RuntimeError(
                f"expected a backward for each call of {layer!r}, the last call first: "
                f"{type(self.layer).__name__}.forward called it {self._noted[id(layer)]} times, got one backward more"
            )
        return waiting.pop()

    def collect(self, layer: Layer, within: _Backward | None) -> None:
        """Add the gradients that a layer's backward has just assigned, and those of the layers within it."""
        self.before = None
        if within is not None:
            for one, _ in within.totals.values():
                # Their current values: the layer may have clipped them.
                self._collect(one, vars(one)["gradients"])
        gradients = vars(layer)["gradients"]
        if id(layer) in self.totals:
            self._collect(layer, gradients)
        else:
            self.totals[id(layer)] = (layer, gradients)

    def _collect(self, layer: Layer, gradients: dict[str, Array]) -> None:
        before = self.totals.get(id(layer))
        if before is not None and (before[1] or gradients):
            names = dict.fromkeys((*before[1], *gradients))
            gradients = {name: added(before[1].get(name), gradients.get(name)) for name in names}
            vars(layer)["gradients"] = gradients
        self.totals[id(layer)] = (layer, gradients)


_ABSENT = object()
_under_way: ContextVar[_Pass | None] = ContextVar("gpu_layers_pass", default=None)


def earlier_calls(layer: Layer) -> int:
    """How often this layer was called so far within the outermost running pass; 0 outside any."""
    count, under_way = 0, _under_way.get()
    while under_way is not None:
        count += _times(layer, under_way.calls)
        under_way = under_way.within
    return count


def _times(layer: Layer, calls: object) -> int:
    """How often a layer is among these calls and the calls within them."""
    if not isinstance(calls, list):
        return 0
    return sum((called is layer) + _times(layer, saved.get("_noted_calls")) for called, saved in calls)


def forget_calls() -> None:
    """Of the pass that is under way, forget what its calls saved so far: they are to be made again in backward.

    That there were these calls stays known: they are counted.
    """
    under_way = _under_way.get()
    if under_way is not None:
        under_way.calls[:] = _counted(under_way.calls)
    if isinstance(under_way, _Backward):
        under_way.forget()


def _counted(calls: Any) -> list[tuple[Layer, Saved]]:
    """Calls without what they saved, but for the calls within them."""
    kept = []
    for layer, saved in calls:
        within = saved.get("_noted_calls")
        kept.append((layer, {"_noted_calls": _counted(within)} if isinstance(within, list) else {}))
    return kept


def put(layer: Layer, saved: Saved | None) -> None:
    """Note that the caller replaced what a layer saved, within the running pass."""
    under_way = _under_way.get()
    if isinstance(under_way, _Forward):
        under_way.replace(layer, saved)
    elif isinstance(under_way, _Backward):
        under_way.choose(layer)


def recording(forward: Callable[..., object]) -> Callable[..., Any]:
    """A forward that notes what it saved in the pass that calls it, and what its own calls saved."""

    @functools.wraps(forward)
    def forward_noted(self: Layer, *args: object, **kwargs: object) -> Any:
        outer = _under_way.get()
        if self._of_this_library and not self._layer_holders:  # it calls no layers
            if outer is None or outer.inside is self:
                return forward(self, *args, **kwargs)
            outer.inside = self
            try:
                y = forward(self, *args, **kwargs)
            finally:
                outer.inside = outer.layer
            outer.note(self, {"_saved": self._saved})
            return y
        if outer is not None and outer.inside is self:
            return forward(self, *args, **kwargs)
        own = vars(self)
        # Attributes that were kept before are kept again, changed or not: holding old values would hold their memory.
        before = {name: value for name, value in own.items() if name not in self._kept_names}
        this = _Forward(self, outer)
        token = _under_way.set(this)
        try:
            y = forward(self, *args, **kwargs)
        finally:
            _under_way.reset(token)
        own["_noted_calls"] = this.calls
        if not self._of_this_library:
            own["_kept_names"] = self._names_to_keep(before)
        if outer is not None:
            outer.note(self, self.last_call)
        return y

    forward_noted.noted = True  # type: ignore[attr-defined]
    return forward_noted


def replaying(backward: Callable[..., object]) -> Callable[..., Any]:
    """A backward of the next call, which gives each call within it what that call saved."""

    @functools.wraps(backward)
    def backward_noted(self: Layer, *args: Any, **kwargs: Any) -> Any:
        outer = _under_way.get()
        plain = self._of_this_library and not self._layer_holders  # it calls no layers
        if outer.inside is self if outer is not None else plain:
            return backward(self, *args, **kwargs)
        if not isinstance(outer, _Backward):
            # An outermost backward is of the last forward. Layers within assign gradients anew; old ones are dropped.
            return backward(self, *args, **kwargs) if plain else _outermost(self, backward, *args, **kwargs)
        own = vars(self)
        saved = outer.next_saved(self) or {}
        if plain:
            return _plain(self, saved, outer, backward, *args, **kwargs)
        saved = self._kept_of(saved)
        present = [(name, own.get(name, _ABSENT)) for name in saved]
        gradients, own["gradients"] = own["gradients"], {}
        own.update(saved)
        try:
            dx, within = _run(self, outer, backward, *args, **kwargs)
        except BaseException:
            own["gradients"] = gradients
            raise
        finally:
            for name, value in present:
                # A bare backward stays that of the last forward; what this backward changed stays changed.
                if own.get(name) is saved[name]:
                    if value is _ABSENT:
                        del own[name]
                    else:
                        own[name] = value
        outer.collect(self, within)
        return dx

    backward_noted.noted = True  # type: ignore[attr-defined]
    return backward_noted


def _plain(
    layer: Layer, saved: Saved, outer: _Backward, backward: Callable[..., object], *args: object, **kwargs: object
) -> Any:
    """The backward of a layer that calls no others: the same, faster."""
    own = vars(layer)
    present, gradients = own["_saved"], own["gradients"]
    own["gradients"] = {}
    if saved:
        own["_saved"] = saved["_saved"]
    outer.inside = layer
    try:
        dx = backward(layer, *args, **kwargs)
    except BaseException:
        own["gradients"] = gradients
        raise
    finally:
        outer.inside = outer.layer
        own["_saved"] = present
    outer.collect(layer, None)
    return dx


def _run(
    layer: Layer,
    outer: _Pass | None,
    backward: Callable[..., Any],
    *args: Any,
    parts: Sequence[Any] = (),
    **kwargs: Any,
) -> tuple[Any, _Backward]:
    calls = layer._noted_calls
    if calls is Calls.INTERRUPTED:
        raise RuntimeError(
            f"{type(layer).__name__}.backward was called before forward: the last forward ended in an exception"
        )
    this = _Backward(layer, outer, calls or [])
    if parts:
        this.before = [(one, vars(one)["gradients"]) for one in parts if one is not layer]
        # By the layers alone: a name for the old gradients would keep the last ones.
        for one in parts:
            if one is not layer:
                vars(one)["gradients"] = {}
    token = _under_way.set(this)
    try:
        return backward(layer, *args, **kwargs), this
    except BaseException:
        for one, gradients in this.before or ():
            vars(one)["gradients"] = gradients
        raise
    finally:
        _under_way.reset(token)


def _outermost(layer: Layer, backward: Callable[..., object], *args: object, **kwargs: object) -> Any:
    parts = [one for _, one in layer.named_layers()]
    dx, this = _run(layer, None, backward, *args, parts=parts, **kwargs)
    by_memory: dict[Hashable, list[tuple[dict[str, Array], str, Array]]] = {}
    for one in parts:
        gradients = vars(one)["gradients"]
        for name, parameter in vars(one)["parameters"].items():
            if one is not layer and id(one) not in this.totals:
                # No part of what was computed.
                gradients.setdefault(name, None)
            if gradients.get(name) is not None:
                by_memory.setdefault(memory_of(parameter), []).append((gradients, name, parameter))
    for places in by_memory.values():
        if len(places) > 1:
            # One array that several layers have as a parameter: each holds its whole gradient, as in PyTorch.
            total, first = None, places[0][2]
            for gradients, name, parameter in places:
                total = added(total, turned(gradients[name], parameter, first))
            for gradients, name, parameter in places:
                gradients[name] = turned(total, first, parameter)
    return dx
