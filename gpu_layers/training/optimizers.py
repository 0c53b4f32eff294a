"""Optimizers, which change parameters in place. The formulas are PyTorch's."""

from __future__ import annotations

import numbers
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, graph_device, is_cupy_array, place_of, require_gpu, to_host
from gpu_layers.core.writes import record_write
from gpu_layers.layers.arrays import memory_of, turned
from gpu_layers.layers.base import moved
from gpu_layers.layers.state import load_arrays_into
from gpu_layers.ops.checks import check_overlap
from gpu_layers.runtime.backend import array_kind
from gpu_layers.runtime.copying import natural, overwrite, own_copy


class Optimizer:
    """The base of optimizers: parameters, one or more arrays of state for each, and the number of steps.

    A step can be captured (:func:`gpu_layers.capture`): then the numbers of steps are kept on the GPU, where replays
    count on. Rates are those of the capture.

    Parameters
    ----------
    parameters : mapping of str to array
        float32 or float64, changed in place by :meth:`step`. A network's ``parameters`` are read anew at each step: the
        optimizer may be made before the network is moved, and its state follows. A copy of them keeps the current
        arrays. An array under several names, or its transpose, is one parameter.
    lr : float
        Learning rate, at least 0; may be set between steps.
    weight_decay : float
        Adds ``weight_decay * parameter`` to each gradient.

    Raises
    ------
    TypeError, ValueError
        For a wrong type or value of these.
    """

    _state_names: tuple[str, ...] = ()
    # Whether the number of updates of each parameter is a part of the state too.
    _counts_updates = False

    def __init__(self, parameters: Mapping[str, Array], lr: float, weight_decay: float) -> None:
        if not isinstance(parameters, Mapping):
            raise TypeError(f"parameters must be a mapping of names to arrays, got {type(parameters).__name__}")
        self._given = parameters
        for name, value in parameters.items():
            array_kind(value)
            if value.dtype not in (np.float32, np.float64):
                raise TypeError(f"parameter {name} must be float32 or float64, got {value.dtype}")
            check_overlap(value)
        self.lr = _not_negative(lr, "lr")
        self.weight_decay = _not_negative(weight_decay, "weight_decay")
        # Numbers of no axes: on the host until a step is captured.
        self._steps = np.zeros((), np.int64)
        self._state: dict[str, Array] = {}
        self._updates: dict[str, Array] = {}
        self._placed: dict[str, Array] = {}
        self._firsts: dict[str, str] = {}
        self._place_state(self.parameters)

    @property
    def steps(self) -> int:
        """How many there were. After a capture this waits for the GPU, which counts the replays."""
        return int(to_host(self._steps))

    @property
    def parameters(self) -> dict[str, Array]:
        """The current parameters."""
        refreshed = getattr(self._given, "refreshed", None)
        return dict(self._given if refreshed is None else refreshed())

    def step(self, gradients: Mapping[str, Array]) -> None:
        """Change every parameter once.

        Parameters
        ----------
        gradients : mapping of str to array or None
            Keys, shapes and dtypes of the parameters; None leaves a parameter and its state as they are. Different
            gradients for one array under several names are added.

        Raises
        ------
        ValueError
            For a missing or extra gradient, or one of another shape, or a parameter that is read-only; nothing is
            changed then.
        TypeError
            For one of another dtype, or in another place than its parameter, or no mapping; nothing is changed then.
        """
        if not isinstance(gradients, Mapping):
            raise TypeError(f"gradients must be a mapping of names to arrays, got {type(gradients).__name__}")
        parameters = self.parameters
        if gradients.keys() != parameters.keys():
            different = sorted(gradients.keys() ^ parameters.keys())
            raise ValueError(
                f"gradients must have the parameters' names, got a difference in {different}: call backward first"
            )
        firsts = self._firsts if self._has_placed(parameters) else _first_names(parameters)
        given: dict[str, Array] = {}
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            _check_alike(name, gradient, parameters[name])
            first = firsts[name]
            with place_of(gradient):
                gradient = natural(turned(gradient, parameters[name], parameters[first]))
            if first not in given:
                given[first] = gradient
            elif memory_of(given[first]) != memory_of(gradient):
                with place_of(gradient):
                    given[first] = given[first] + gradient
        if firsts is not self._firsts:
            self._place_state(parameters)
        if graph_device.get() is not None:
            self._count_on_gpu()
        with place_of(self._steps):
            self._steps += 1
        for name, gradient in given.items():
            parameter = parameters[name]
            with place_of(parameter):
                value = natural(parameter)
                if self.weight_decay:
                    gradient = gradient + self.weight_decay * value
                value -= self._change(name, gradient)
                if value is not parameter:
                    overwrite(parameter, value)
            record_write(parameter)

    def _count_on_gpu(self) -> None:
        """Move the numbers of steps to the current GPU: a replay does nothing on the host."""
        cupy = require_gpu()
        self._steps = cupy.asarray(self._steps)
        self._updates = {name: cupy.asarray(count) for name, count in self._updates.items()}

    def _has_placed(self, parameters: Mapping[str, Array]) -> bool:
        """Whether the state is that of exactly these arrays."""
        placed = self._placed
        return len(parameters) == len(placed) and all(placed.get(name) is value for name, value in parameters.items())

    def _place_state(self, parameters: dict[str, Array]) -> None:
        """Put the state of each parameter on its device; new states start at 0, others are dropped."""
        firsts = self._firsts = _first_names(parameters)
        self._placed = parameters
        before, self._state = self._state, {}
        counts, self._updates = self._updates, {}
        for kind in self._state_names:
            for name in (name for name, first in firsts.items() if name == first):
                key, parameter = f"{kind}.{name}", parameters[name]
                xp, state = array_module(parameter), before.get(key)
                fits = state is not None and (state.shape, state.dtype) == (parameter.shape, parameter.dtype)
                with place_of(parameter):
                    self._state[key] = moved(state, xp) if fits else xp.zeros_like(parameter)
                if self._counts_updates:
                    count = counts[f"updates.{name}"] if fits else np.zeros((), np.int64)
                    self._updates[f"updates.{name}"] = moved(count, xp) if is_cupy_array(count) else count

    def _change(self, name: str, gradient: Array) -> Array:
        """The number to subtract from a parameter; updates its state."""
        raise TypeError(f"{type(self).__name__} defines no step")

    def state_dict(self) -> dict[str, Array]:
        """Copies of the numbers of steps and of the state of every parameter. Rates are not in it."""
        own = self._own()
        return {name: own_copy(value if name in self._state else to_host(value)) for name, value in own.items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Load a ``state``; all or nothing.

        Parameters
        ----------
        state : mapping of str to array
            The keys and shapes of :meth:`state_dict`, in any form that :meth:`Layer.load_state_dict` takes.

        Raises
        ------
        ValueError, TypeError
            If it belongs to another kind of optimizer or to other parameters.
        """
        own = self._own()
        if isinstance(state, Mapping) and "steps" in state and not self._updates.keys() & state.keys():
            # Of version 0.2 and before: each parameter had an update in every step.
            state = {**state, **dict.fromkeys(self._updates, state["steps"])}
        try:
            load_arrays_into(own, state, True, type(self).__name__)
        except ValueError as error:
            told = str(error).removeprefix(f"Error(s) in loading state_dict for {type(self).__name__}: ")
            raise ValueError(f"state of another optimizer: {told}") from None

    def _own(self) -> dict[str, Array]:
        self._place_state(self.parameters)
        return {"steps": self._steps, **self._updates, **self._state}


class SGD(Optimizer):
    """Stochastic gradient descent with momentum: ``v = momentum * v + g``; ``parameter -= lr * v``.

    Parameters
    ----------
    parameters, lr, weight_decay
        As in :class:`Optimizer`.
    momentum : float
        In [0, 1).

    Raises
    ------
    TypeError, ValueError
        For a wrong type or value of these.
    """

    _state_names = ("velocity",)

    def __init__(
        self, parameters: Mapping[str, Array], lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, lr, weight_decay)
        self.momentum = _below_one(momentum, "momentum")

    def _change(self, name: str, gradient: Array) -> Array:
        velocity = self._state[f"velocity.{name}"]
        velocity *= self.momentum
        velocity += gradient
        return self.lr * velocity


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015): each element's step is scaled by the running size of its gradient.

    As in PyTorch, a step that has no gradient for a parameter is not counted in the correction of its averages.

    Parameters
    ----------
    parameters, lr, weight_decay
        As in :class:`Optimizer`.
    betas : tuple of two float
        Decay of the running mean of the gradient and of its square, in [0, 1).
    eps : float
        Added to the root of the latter.

    Raises
    ------
    TypeError, ValueError
        For a wrong type or value of these.
    """

    _state_names = ("mean", "square")
    _counts_updates = True

    def __init__(
        self,
        parameters: Mapping[str, Array],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr, weight_decay)
        if not isinstance(betas, Sequence):
            raise TypeError(f"betas must be a pair of numbers, got {type(betas).__name__}")
        if len(betas) != 2:
            raise ValueError(f"betas must be a pair of numbers, got {betas}")
        self.betas = (_below_one(betas[0], "betas[0]"), _below_one(betas[1], "betas[1]"))
        self.eps = _not_negative(eps, "eps")

    def _change(self, name: str, gradient: Array) -> Array:
        mean, square = self._state[f"mean.{name}"], self._state[f"square.{name}"]
        for average, newest, beta in ((mean, gradient, self.betas[0]), (square, gradient * gradient, self.betas[1])):
            average *= beta
            average += (1 - beta) * newest
        # Both averages start at 0: their expectation is short by these factors.
        updates = self._updates[f"updates.{name}"]
        updates += 1
        mean_bias, square_bias = (1 - beta ** updates.astype(np.float64) for beta in self.betas)
        root = array_module(square).sqrt(square) / (square_bias**0.5).astype(square.dtype)
        return (self.lr / mean_bias).astype(mean.dtype) * mean / (root + self.eps)


def _first_names(parameters: Mapping[str, Array]) -> dict[str, str]:
    """For each name, the first name of the same array."""
    firsts: dict[Hashable, str] = {}
    return {name: firsts.setdefault(memory_of(value), name) for name, value in parameters.items()}


def _check_alike(name: str, gradient: Array, parameter: Array) -> None:
    array_kind(gradient)
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"size mismatch for {name}: got shape {list(gradient.shape)}, expected {list(parameter.shape)}"
        )
    if gradient.dtype != parameter.dtype:
        raise TypeError(f"dtype mismatch for {name}: got {gradient.dtype}, expected {parameter.dtype}")
    if array_module(gradient) is not array_module(parameter):
        raise TypeError(
            f"the gradient of {name} must be a {type(parameter).__module__} array like the parameter, got a "
            f"{type(gradient).__module__} array: pass network.parameters itself to the optimizer, or make it after the "
            "move"
        )
    if isinstance(parameter, np.ndarray) and not parameter.flags.writeable:
        raise ValueError(f"parameter {name} is read-only")


def _not_negative(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return number


def _below_one(value: object, name: str) -> float:
    number = _not_negative(value, name)
    if number >= 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return number
