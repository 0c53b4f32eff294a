"""The base of all layers: mode, parameters and gradients, state, device, backward, and the layers within."""

from __future__ import annotations

import functools
import reprlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import is_cupy_array, require_gpu
from gpu_layers.layers.arrays import LayerArrays, memory_of, turned
from gpu_layers.layers.calls import Saved, put, recording, replaying
from gpu_layers.layers.state import IncompatibleKeys, load_arrays_into
from gpu_layers.runtime.copying import own_copy
from gpu_layers.runtime.ranges import add_layer_class

__all__ = ["Layer"]

_Method = TypeVar("_Method", bound=Callable[..., Any])
_Self = TypeVar("_Self", bound="Layer")

#: Attributes of a layer in which no layer is looked for.
NO_LAYERS_IN = frozenset(
    {*("parameters", "gradients", "buffers", "last_call"), *("_saved", "_noted_calls", "_kept_names", "_layer_holders")}
)


def _entered_once(method: _Method) -> _Method:
    """A method that calls itself on the layers within; it does nothing for a layer that it is visiting already."""
    visited: set[tuple[int, int]] = set()

    @functools.wraps(method)
    def once(self: Any, *args: Any, **kwargs: Any) -> Any:
        visit = (id(self), threading.get_ident())
        if visit in visited:
            return self
        visited.add(visit)
        try:
            return method(self, *args, **kwargs)
        finally:
            visited.discard(visit)

    return once  # type: ignore[return-value]


class Layer:
    """A layer: ``y = layer(x)`` and then ``dx = layer.backward(dy)``.

    A layer owns the layers in its attributes, and those in lists, tuples and dicts there. :meth:`train`, :meth:`eval`,
    :meth:`to`, :meth:`state_dict`, :meth:`load_state_dict`, ``parameters``, ``gradients``, ``buffers`` and the repr
    include them, under PyTorch's dotted names: ``"norm.weight"``, ``"blocks.0.norm.weight"``. A list that repeats
    layers which are attributes too adds no second names.

    The backward of a layer calls the backwards of the layers that its forward called, for each layer the last call
    first. Then a layer may be called any number of times: each backward belongs to its call, and gradients add up, also
    those of an array that is a parameter of several layers. What a forward assigns to attributes is kept for its
    backward, and so are the items of dicts there.

    Attributes
    ----------
    training : bool
        Mode of the next forward; see :meth:`train` and :meth:`eval`.
    parameters : dict of str to array
        Arrays that an optimizer changes in place.
    gradients : dict of str to array or None
        The same keys, after backward has run; each backward assigns them anew. None for a parameter that is not
        trained, or that took no part in the computation.
    buffers : dict of str to array
        The rest of the state: running statistics.

    Examples
    --------
    >>> import numpy as np
    >>> import gpu_layers as gl
    >>> class Residual(gl.Layer):
    ...     def __init__(self, features):
    ...         super().__init__()
    ...         self.linear = gl.Linear(features, features, seed=0)
    ...         self.norms = [gl.BatchNorm1d(features), gl.BatchNorm1d(features)]
    ...         self.relu = gl.ReLU()
    ...
    ...     def forward(self, x):
    ...         y = self.relu(self.norms[0](self.linear(x)))
    ...         return self.relu(self.norms[1](self.linear(y)) + x)
    ...
    ...     def backward(self, dy):
    ...         dx = self.relu.backward(dy)
    ...         dy = self.linear.backward(self.norms[1].backward(dx))
    ...         return dx + self.linear.backward(self.norms[0].backward(self.relu.backward(dy)))
    >>> layer, x = Residual(3), np.ones((4, 3), np.float32)
    >>> dx = layer.backward(layer(x))
    >>> list(layer.gradients)
    ['linear.weight', 'linear.bias', 'norms.0.weight', 'norms.0.bias', 'norms.1.weight', 'norms.1.bias']

    If backwards run in another order, ``last_call`` says which call is meant:

    >>> relu = gl.ReLU()
    >>> y, first = relu(x), relu.last_call
    >>> z = relu(-x)
    >>> relu.last_call = first
    >>> bool((relu.backward(x) == x).all())
    True
    """

    #: Names of attributes that may hold layers, in the order in which they came.
    _layer_holders: tuple[str, ...] = ()
    #: Names of attributes that the last forward left for backward.
    _kept_names: tuple[str, ...] = ("_saved", "_noted_calls")
    _noted_calls: Any = None
    #: The attribute whose layers have no more than their own names.
    _unnamed_holder: str | None = None
    _of_this_library = True

    training: bool
    _saved: Any

    def __new__(cls: type[_Self], *args: object, **kwargs: object) -> _Self:
        """A layer without parameters, in training mode, also if its class never calls this constructor."""
        layer = super().__new__(cls)
        # The layer's own arrays have the names of the properties, which come before them.
        vars(layer).update(training=True, parameters={}, gradients={}, buffers={}, _saved=None)
        return layer

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        cls._of_this_library = cls.__module__.startswith("gpu_layers.")
        for name, noting in (("__call__", recording), ("forward", recording), ("backward", replaying)):
            # The class's own method, or one that it inherits from a class that is not a layer.
            method = getattr(cls, name)
            if method is not getattr(Layer, name) and not hasattr(method, "noted"):
                setattr(cls, name, noting(method))
        add_layer_class(cls)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_saved":
            own = vars(self)
            if value is None:
                # Forgetting what a layer saved also forgets what its calls of other layers saved.
                own.pop("_noted_calls", None)
            own[name] = value
            return
        if isinstance(value, (Layer, list, tuple, dict, set, frozenset)) and name not in NO_LAYERS_IN:
            self._note_layer_holder(name, value)
        object.__setattr__(self, name, value)

    def _note_layer_holder(self, name: str, value: object) -> None:
        if isinstance(value, (set, frozenset)):
            if any(isinstance(one, Layer) for one in value):
                raise TypeError(f"{name} must hold layers in an order, got a set: use a list or a dict")
            return
        # Lists and dicts may get layers later; a tuple cannot.
        if name not in self._layer_holders and not (isinstance(value, tuple) and not _may_hold(value)):
            # A new tuple, as shallow copies share it.
            object.__setattr__(self, "_layer_holders", (*self._layer_holders, name))

    def __call__(self, x: Array, *args: object, **kwargs: object) -> Array:
        """:meth:`forward`."""
        return self.forward(x, *args, **kwargs) if args or kwargs else self.forward(x)

    def forward(self, x: Array) -> Array:
        """The layer's output for ``x``; it saves what :meth:`backward` needs."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def backward(self, dy: Array) -> Array:
        """Gradient of the input; assigns :attr:`gradients`. May be repeated until the next forward.

        Parameters
        ----------
        dy : array
            Gradient of the last forward's output, of its shape and dtype.

        Returns
        -------
        array
            Of the shape and dtype of x.

        Raises
        ------
        RuntimeError
            Before any forward; if a forward ended in an exception after it had called other layers; or if a layer
            within has more backwards than its forward had calls.
        """
        raise TypeError(f"{type(self).__name__} defines no backward")

    @property
    def parameters(self) -> dict[str, Array]:
        """Of this layer and those within."""
        return self._arrays_by_name("parameters")

    @parameters.setter
    def parameters(self, arrays: dict[str, Array]) -> None:
        self._assign_arrays("parameters", arrays)

    @property
    def gradients(self) -> dict[str, Array]:
        """Of this layer and those within."""
        return self._arrays_by_name("gradients")

    @gradients.setter
    def gradients(self, arrays: dict[str, Array]) -> None:
        self._assign_arrays("gradients", arrays)

    @property
    def buffers(self) -> dict[str, Array]:
        """Of this layer and those within."""
        return self._arrays_by_name("buffers")

    @buffers.setter
    def buffers(self, arrays: dict[str, Array]) -> None:
        self._assign_arrays("buffers", arrays)

    def _arrays_by_name(self, kind: str) -> dict[str, Array]:
        if self._layer_holders and next(self.named_children(), None) is not None:
            return LayerArrays(self, kind)
        own: dict[str, Array] = vars(self)[kind]
        return own

    def _assign_arrays(self, kind: str, arrays: dict[str, Array]) -> None:
        """Replace the layer's own arrays; arrays with the name of a layer within go there."""
        own, within = arrays, {}
        if self._layer_holders:
            layers = dict(self.named_layers(remove_duplicate=False))
            within = {
                name: value for name, value in arrays.items() if "." in name and name.rpartition(".")[0] in layers
            }
            own = {name: value for name, value in arrays.items() if name not in within} if within else arrays
        vars(self)[kind] = own
        if within:
            LayerArrays(self, kind).update(within)

    @property
    def last_call(self) -> Saved:
        """What the last forward saved for :meth:`backward`. Assigned again later, backward is that of this forward.

        Assigning None forgets what the layers of this library saved, and frees its memory.
        """
        own = vars(self)
        if self._of_this_library:
            return {name: own.get(name) for name in self._kept_names}
        # All attributes: only after the last forward is it certain which of them forwards assign.
        return {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in own.items()
            if name in ("_saved", "_noted_calls") or (name not in NO_LAYERS_IN and not _holds_layers(value))
        }

    @last_call.setter
    def last_call(self, saved: Mapping[str, object] | None) -> None:
        put(self, None if saved is None else dict(saved))
        self._saved = None
        if saved is not None:
            vars(self).update(self._kept_of(saved))
            if self._noted_calls is None:
                vars(self).pop("_noted_calls", None)

    def _kept_of(self, saved: Mapping[str, object]) -> Saved:
        """From all attributes at the end of a forward, those that forwards assign."""
        return {name: saved[name] for name in self._kept_names if name in saved}

    def _saved_by_forward(self) -> Any:
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}.backward was called before forward")
        return self._saved

    def _names_to_keep(self, before: Mapping[str, object]) -> tuple[str, ...]:
        """The attributes that forwards have assigned so far; ``before`` are those before this forward."""
        absent = object()
        changed = (
            name
            for name, value in vars(self).items()
            if (before.get(name, absent) is not value or isinstance(value, dict))
            and name not in NO_LAYERS_IN
            and not _holds_layers(value)
        )
        return tuple(dict.fromkeys((*self._kept_names, *changed)))

    def named_children(self) -> Iterator[tuple[str, Layer]]:
        """The layers that this one holds, with their names. A layer that is held twice comes twice.

        Raises
        ------
        ValueError
            For keys of a dict that cannot be names: with a dot, or equal as text.
        """
        if not self._layer_holders:
            return
        own = vars(self)
        direct = {id(own[name]) for name in self._layer_holders if isinstance(own.get(name), Layer)}
        for holder in self._layer_holders:
            value = own.get(holder)
            if isinstance(value, Layer):
                yield holder, value
                continue
            for name, layer in _layers_within(value, () if holder == self._unnamed_holder else (holder,), ()):
                if id(layer) not in direct:
                    yield ".".join(name), layer

    def named_layers(self, prefix: str = "", *, remove_duplicate: bool = True) -> Iterator[tuple[str, Layer]]:
        """This layer and all within it, with dotted names, as ``torch.nn.Module.named_modules``.

        Parameters
        ----------
        prefix : str
            This layer's own name.
        remove_duplicate : bool
            Whether a layer that is held several times comes once, under its first name.

        Returns
        -------
        iterator of (str, Layer)
        """
        yield from _walk(self, prefix, set() if remove_duplicate else None, ())

    @_entered_once
    def train(self, mode: bool = True) -> Layer:
        """Switch to training mode, with all layers within; with ``mode=False`` to evaluation.

        Returns
        -------
        Layer
            This layer.

        Raises
        ------
        TypeError
            If mode is not a bool.
        """
        if not isinstance(mode, (bool, np.bool_)):
            raise TypeError(f"training mode is expected to be boolean, got {type(mode).__name__}")
        self.training = bool(mode)
        for _, layer in self.named_children():
            layer.train(mode)
        return self

    def eval(self) -> Layer:
        """Switch to evaluation mode; returns the layer."""
        return self.train(False)

    def _named_state(self) -> dict[str, Array]:
        """The arrays themselves; those of a layer that is held twice under both names, as in PyTorch."""
        return {
            f"{prefix}.{name}" if prefix else name: array
            for prefix, layer in self.named_layers(remove_duplicate=False)
            for name, array in {**vars(layer)["parameters"], **vars(layer)["buffers"]}.items()
        }

    def state_dict(self) -> dict[str, Array]:
        """Parameters and buffers under PyTorch's names; copies, which later training does not change."""
        return {name: own_copy(value) for name, value in self._named_state().items()}

    def load_state_dict(self, state: Mapping[str, object], strict: bool = True) -> IncompatibleKeys:
        """Copy parameters and buffers into the layer's arrays; all or nothing.

        Parameters
        ----------
        state : mapping of str to array
            The keys and shapes of :meth:`state_dict`. Values are NumPy or CuPy arrays or PyTorch tensors, on any
            device; the results of ``numpy.load`` and ``cupy.load`` for an ``.npz`` file work too. Floating numbers of
            any dtype are rounded to the layer's. ``num_batches_tracked`` may be missing beside running statistics, as
            in checkpoints from before PyTorch 0.4.1; it then counts as 0.
        strict : bool
            Whether missing and unexpected keys are an error.

        Returns
        -------
        IncompatibleKeys
            A named tuple of the lists ``missing_keys`` and ``unexpected_keys``, as PyTorch returns it.

        Raises
        ------
        ValueError
            For missing or unexpected keys or wrong shapes, all named; for a fractional number of batches; if an array
            of the layer is read-only; for different values for an array that two layers share. Nothing is loaded then.
        TypeError
            For another dtype, or a state that is not a mapping; nothing is loaded then.
        """
        return load_arrays_into(self._named_state(), state, bool(strict), type(self).__name__)

    @_entered_once
    def to(self, device: str) -> Layer:
        """Move parameters and buffers, with all layers within, to ``device``. What a forward saved is dropped.

        Layers that share an array share it afterwards too.

        Parameters
        ----------
        device : {"cpu", "cuda"}
            "cuda" is CuPy's current device.

        Returns
        -------
        Layer
            This layer.

        Raises
        ------
        ValueError
            For another device.
        RuntimeError
            If there is no GPU or no CuPy.
        """
        xp = device_module(device)
        shared = self._shared_arrays()
        for arrays in (vars(self)[kind] for kind in ("parameters", "gradients", "buffers")):
            for name, value in arrays.items():
                arrays[name] = None if value is None else moved(value, xp)
        for _, layer in self.named_children():
            layer.to(device)
        for places in shared:
            first, first_name, first_before = places[0]
            for arrays, name, before in places[1:]:
                arrays[name] = turned(first[first_name], first_before, before)
        self.last_call = None
        return self

    def _shared_arrays(self) -> list[list[tuple[dict[str, Array], str, Array]]]:
        """The places of each array that is in several places."""
        places: dict[Hashable, list[tuple[dict[str, Array], str, Array]]] = {}
        for _, layer in self.named_layers():
            for kind in ("parameters", "gradients", "buffers"):
                arrays = vars(layer)[kind]
                for name, array in arrays.items():
                    if array is not None:
                        places.setdefault(memory_of(array), []).append((arrays, name, array))
        return [each for each in places.values() if len(each) > 1]

    def _configuration(self) -> str:
        """The text between the parentheses of the repr."""
        return ""

    @reprlib.recursive_repr("...")
    def __repr__(self) -> str:
        lines = [f"({name}): {layer!r}" for name, layer in self.named_children()]
        configuration = self._configuration()
        if not lines:
            return f"{type(self).__name__}({configuration})"
        lines = [configuration, *lines] if configuration else lines
        return f"{type(self).__name__}(\n" + "".join("  " + line.replace("\n", "\n  ") + "\n" for line in lines) + ")"


def _may_hold(value: tuple[object, ...]) -> bool:
    return any(isinstance(one, (Layer, list, dict)) or (isinstance(one, tuple) and _may_hold(one)) for one in value)


def _holds_layers(value: object) -> bool:
    return isinstance(value, Layer) or next(_layers_within(value, (), ()), None) is not None


def _layers_within(
    value: object, name: tuple[str, ...], path: tuple[int, ...]
) -> Iterator[tuple[tuple[str, ...], Layer]]:
    """The layers in lists, tuples and dicts, and the parts of their names."""
    if isinstance(value, Layer):
        yield name, value
        return
    if not isinstance(value, (list, tuple, dict)) or id(value) in path:
        return
    names: set[str] = set()
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(one, Layer):
            found = [((*name, str(key)), one)]
        else:
            found = list(_layers_within(one, (*name, str(key)), (*path, id(value))))
        if found and ("." in str(key) or str(key) in names):
            raise ValueError(f"names of layers in {'.'.join(name)} must be unique and have no dot, got {key!r}")
        if found:
            names.add(str(key))
            yield from found


def _walk(layer: Layer, name: str, seen: set[int] | None, path: tuple[Layer, ...]) -> Iterator[tuple[str, Layer]]:
    if seen is None:
        # A layer that refers to one it is within is not part of itself.
        if any(layer is one for one in path):
            return
    elif id(layer) in seen:
        return
    else:
        seen.add(id(layer))
    yield name, layer
    if not layer._layer_holders:
        return
    for child_name, child in layer.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, seen, (*path, layer))


def device_module(device: str) -> ModuleType:
    """NumPy for "cpu", CuPy for "cuda"; the errors of :meth:`Layer.to`."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    return np if device == "cpu" else require_gpu()


def moved(array: Array, xp: ModuleType) -> Array:
    """The array as one of ``xp``: NumPy or CuPy."""
    if xp is np:
        return array.get() if is_cupy_array(array) else np.asarray(array)
    return xp.asarray(array)
