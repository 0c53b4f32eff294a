"""What every layer has: a mode, parameters and gradients, a state, a place, a backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_layers.runtime.cuda import array_module, is_cupy_array, require_gpu
from gpu_layers.runtime.ranges import add_layer_class
from gpu_layers.runtime.writes import record_write


class Layer:
    """A layer: ``y = layer(x)`` and then ``dx = layer.backward(dy)``.

    Attributes
    ----------
    training : bool
        Mode of the next forward; see :meth:`train` and :meth:`eval`.
    parameters : dict of str to array
        What an optimizer changes, in place.
    gradients : dict of str to array or None
        The same keys, once backward has run; assigned anew by each backward. None for one that is not trained.
    """

    def __init__(self) -> None:
        self.training = True
        self.parameters: dict[str, Any] = {}
        self.gradients: dict[str, Any] = {}
        self.buffers: dict[str, Any] = {}
        self._saved: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        add_layer_class(cls)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """:meth:`forward`."""
        return self.forward(x, *args, **kwargs)

    def forward(self, x: Any) -> Any:
        """The layer's output; keeps what :meth:`backward` needs."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def backward(self, dy: Any) -> Any:
        """Gradient of the input; assigns :attr:`gradients`. May be repeated until the next forward.

        Parameters
        ----------
        dy : array
            Gradient of the last forward's output, of its shape and dtype.

        Raises
        ------
        RuntimeError
            Before any forward.
        """
        raise TypeError(f"{type(self).__name__} defines no backward")

    def _saved_by_forward(self) -> Any:
        if self._saved is None:
            raise RuntimeError(f"{type(self).__name__}.backward was called before forward")
        return self._saved

    def train(self, mode: bool = True) -> Layer:
        """Switch to training mode (or, with False, to evaluation); returns the layer."""
        if not isinstance(mode, (bool, np.bool_)):
            raise TypeError(f"training mode is expected to be boolean, got {type(mode).__name__}")
        self.training = bool(mode)
        return self

    def eval(self) -> Layer:
        """Switch to evaluation mode; returns the layer."""
        return self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers under PyTorch's names; copies, which later training does not change."""
        return {name: value.copy() for name, value in {**self.parameters, **self.buffers}.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over parameters and buffers, copied to where the layer is; all or nothing.

        Parameters
        ----------
        state : mapping of str to array
            Exactly the keys, shapes and dtypes of :meth:`state_dict`.

        Raises
        ------
        ValueError
            For missing or unexpected keys or a wrong shape, all named; nothing is loaded then.
        TypeError
            For a wrong dtype, or a state that is no mapping; nothing is loaded then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"Expected state_dict to be dict-like, got {type(state)}.")
        own = {**self.parameters, **self.buffers}
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise ValueError(
                f"Error(s) in loading state_dict for {type(self).__name__}: "
                f"missing keys {missing}, unexpected keys {unexpected}"
            )
        arrays = {name: state[name] if hasattr(state[name], "dtype") else np.asarray(state[name]) for name in own}
        for name, value in arrays.items():
            if tuple(value.shape) != own[name].shape:
                raise ValueError(
                    f"size mismatch for {name}: copying a param with shape {list(value.shape)}, "
                    f"the shape in {type(self).__name__} is {list(own[name].shape)}"
                )
            if value.dtype != own[name].dtype:
                raise TypeError(
                    f"dtype mismatch for {name}: {value.dtype} given, {own[name].dtype} in {type(self).__name__}"
                )
        for name, value in arrays.items():
            own[name][...] = moved(value, array_module(own[name]))
            record_write(own[name])

    def to(self, device: str) -> Layer:
        """Move parameters and buffers; what a forward saved for backward is dropped.

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
        for arrays in (self.parameters, self.gradients, self.buffers):
            for name, value in arrays.items():
                arrays[name] = None if value is None else moved(value, xp)
        self._saved = None
        return self

    def _configuration(self) -> str:
        """What stands between the parentheses of the repr."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._configuration()})"


def device_module(device: str) -> Any:
    """NumPy for "cpu", CuPy for "cuda"; the errors of :meth:`Layer.to`."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    return np if device == "cpu" else require_gpu()


def moved(array: Any, xp: Any) -> Any:
    """The array as one of ``xp``: NumPy or CuPy."""
    if xp is np:
        return array.get() if is_cupy_array(array) else np.asarray(array)
    return xp.asarray(array)
