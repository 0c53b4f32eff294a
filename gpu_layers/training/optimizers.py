"""Optimizers: they change parameters in place. The formulas are PyTorch's."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_layers.ops.checks import check_overlap
from gpu_layers.runtime.cuda import array_module, is_cupy_array
from gpu_layers.runtime.writes import record_write


class Optimizer:
    """What optimizers share: the parameters, one or more arrays of state for each, and the number of steps taken.

    Parameters
    ----------
    parameters : mapping of str to array
        float32 or float64. Changed in place by :meth:`step`.
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

    def __init__(self, parameters: Mapping[str, Any], lr: float, weight_decay: float) -> None:
        self.parameters = dict(parameters)
        for name, value in self.parameters.items():
            if value.dtype not in (np.float32, np.float64):
                raise TypeError(f"parameter {name} must be float32 or float64, got {value.dtype}")
            check_overlap(value)
        self.lr = _not_negative(lr, "lr")
        self.weight_decay = _not_negative(weight_decay, "weight_decay")
        self.steps = 0
        self._state = {
            f"{kind}.{name}": array_module(value).zeros_like(value)
            for kind in self._state_names
            for name, value in self.parameters.items()
        }

    def step(self, gradients: Mapping[str, Any]) -> None:
        """Change every parameter once.

        Parameters
        ----------
        gradients : mapping of str to array or None
            Keys, shapes and dtypes of the parameters; None leaves a parameter and its state as they are.

        Raises
        ------
        ValueError
            For a missing or extra gradient, or one of another shape; nothing is changed then.
        TypeError
            For one of another dtype; nothing is changed then.
        """
        if gradients.keys() != self.parameters.keys():
            different = sorted(gradients.keys() ^ self.parameters.keys())
            raise ValueError(f"gradients and parameters differ in {different}; step comes after backward")
        given = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        for name, gradient in given.items():
            _check_alike(name, gradient, self.parameters[name])
        self.steps += 1
        for name, gradient in given.items():
            parameter = self.parameters[name]
            if self.weight_decay:
                gradient = gradient + self.weight_decay * parameter
            parameter -= self._change(name, gradient)
            record_write(parameter)

    def _change(self, name: str, gradient: Any) -> Any:
        """What to subtract from a parameter; updates its state."""
        raise TypeError(f"{type(self).__name__} defines no step")

    def state_dict(self) -> dict[str, Any]:
        """Number of steps and state of every parameter; copies. The rates are configuration and not in it."""
        return {"steps": np.array(self.steps, np.int64), **{name: value.copy() for name, value in self._state.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; all or nothing.

        Raises
        ------
        ValueError, TypeError
            If it is not of this kind of optimizer with these parameters.
        """
        own = {"steps": np.array(self.steps, np.int64), **self._state}
        if state.keys() != own.keys():
            raise ValueError(
                f"state of another optimizer: missing keys {sorted(own.keys() - state.keys())}, "
                f"unexpected keys {sorted(state.keys() - own.keys())}"
            )
        for name, value in own.items():
            _check_alike(name, state[name], value)
        self.steps = int(state["steps"])
        for name, value in self._state.items():
            given = state[name].get() if is_cupy_array(state[name]) else state[name]
            value[...] = array_module(value).asarray(given)


class SGD(Optimizer):
    """Stochastic gradient descent with momentum: ``v = momentum * v + g``; ``parameter -= lr * v``.

    Parameters
    ----------
    parameters, lr, weight_decay
        As in :class:`Optimizer`.
    momentum : float
        In [0, 1).
    """

    _state_names = ("velocity",)

    def __init__(
        self, parameters: Mapping[str, Any], lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, lr, weight_decay)
        self.momentum = _below_one(momentum, "momentum")

    def _change(self, name: str, gradient: Any) -> Any:
        velocity = self._state[f"velocity.{name}"]
        velocity *= self.momentum
        velocity += gradient
        return self.lr * velocity


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015): each element's step is scaled by the running size of its gradient.

    Parameters
    ----------
    parameters, lr, weight_decay
        As in :class:`Optimizer`.
    betas : tuple of two float
        Decay of the running mean of the gradient and of its square, in [0, 1).
    eps : float
        Added to the root of the latter.
    """

    _state_names = ("mean", "square")

    def __init__(
        self,
        parameters: Mapping[str, Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr, weight_decay)
        self.betas = (_below_one(betas[0], "betas[0]"), _below_one(betas[1], "betas[1]"))
        self.eps = _not_negative(eps, "eps")

    def _change(self, name: str, gradient: Any) -> Any:
        mean, square = self._state[f"mean.{name}"], self._state[f"square.{name}"]
        for average, newest, beta in ((mean, gradient, self.betas[0]), (square, gradient * gradient, self.betas[1])):
            average *= beta
            average += (1 - beta) * newest
        # Both averages start at 0: their expectation is short by these factors.
        mean_bias, square_bias = (1 - beta**self.steps for beta in self.betas)
        root = array_module(square).sqrt(square) / square_bias**0.5
        return (self.lr / mean_bias) * mean / (root + self.eps)


def _check_alike(name: str, given: Any, own: Any) -> None:
    if given.shape != own.shape:
        raise ValueError(f"size mismatch for {name}: got shape {list(given.shape)}, expected {list(own.shape)}")
    if given.dtype != own.dtype:
        raise TypeError(f"dtype mismatch for {name}: got {given.dtype}, expected {own.dtype}")


def _not_negative(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return number


def _below_one(value: Any, name: str) -> float:
    number = _not_negative(value, name)
    if number >= 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return number
