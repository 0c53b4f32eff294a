"""Activation and dropout in one layer."""

from __future__ import annotations

from typing import Any

from gpu_layers import random
from gpu_layers.core.array import Array, Options
from gpu_layers.layers.draws import check_generator, drawn
from gpu_layers.layers.dropout import first_decision
from gpu_layers.layers.operation_layer import OperationLayer
from gpu_layers.ops.activation_dropout import activation_dropout_backward, activation_dropout_forward, check_order
from gpu_layers.ops.checks import check_activation, check_probability

__all__ = ["ActivationDropout"]


class ActivationDropout(OperationLayer):
    """An activation phi and dropout D in one kernel each way; in evaluation the activation alone.

    ReLU, leaky ReLU and identity are positively homogeneous: both orders are then the same function. Dropout before a
    sigmoid makes a dropped element 1/2, not 0, which shifts the mean of the next layer's input.

    Parameters
    ----------
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"}
        leaky_relu has a slope of 0.01, gelu is the exact one (by erf).
    p : float
        In [0, 1].
    order : {"after", "before"}
        ``D(phi(x))`` or ``phi(D(x))``.
    generator : Generator, optional
        Source of the masks; ``gpu_layers.default_generator`` by default. Each training forward takes one offset,
        whatever p is. Evaluation and backward take none.

    Attributes
    ----------
    first_sample : int
        Number of the input's first sample in the batch, if the input is a part of a batch; 0 at first.

    Raises
    ------
    ValueError
        For p outside [0, 1] or NaN, or an unknown activation or order.
    """

    _gradient = staticmethod(activation_dropout_backward)

    def __init__(
        self, activation: str, p: float = 0.5, *, order: str = "after", generator: random.Generator | None = None
    ) -> None:
        super().__init__()
        self.activation, self.order = check_activation(activation), check_order(order)
        self.p = check_probability(p)
        self.generator = check_generator(generator)
        self.first_sample = 0
        self._taken: Array = None
        self._taken_again: tuple[Any, ...] = ()

    def forward(self, x: Array) -> Array:
        """Activation and, in training, dropout.

        Parameters
        ----------
        x : array
            Any shape.

        Returns
        -------
        array
            x's shape and dtype.

        Raises
        ------
        TypeError, ValueError
            For a wrong array type or dtype; the generator then stays as it was.
        """
        if self.training:
            options: Options = {"order": self.order, "start": first_decision(x, self.first_sample)}
            (y, saved), taken = drawn(self, activation_dropout_forward, x, self.activation, self.p, **options)
            self._saved = saved if taken is None else saved.with_rng_state(taken)
        else:
            y, self._saved = activation_dropout_forward(x, self.activation, 0.0, 0, 0)
        return y

    def _configuration(self) -> str:
        order = "" if self.order == "after" else f", order={self.order!r}"
        return f"{self.activation!r}, p={self.p}{order}"
