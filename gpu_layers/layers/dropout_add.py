"""Bias, activation, dropout and the sum with a residual in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_layers import random
from gpu_layers.core.array import Array, DTypeLike, Options
from gpu_layers.core.checks import check_integer
from gpu_layers.layers.base import Layer
from gpu_layers.layers.draws import check_generator, drawn
from gpu_layers.layers.dropout import first_decision
from gpu_layers.layers.precision import parameter_dtype
from gpu_layers.ops.activation_dropout import check_order
from gpu_layers.ops.checks import check_activation, check_probability
from gpu_layers.ops.dropout import check_shared_axes
from gpu_layers.ops.dropout_add import dropout_add_backward, dropout_add_forward

__all__ = ["DropoutAdd"]


class DropoutAdd(Layer):
    """``residual + D(phi(x + bias))`` in one kernel each way, as at the end of a branch of a transformer.

    In evaluation it is ``residual + phi(x + bias)``.

    Parameters
    ----------
    p : float
        In [0, 1].
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        phi, as in :class:`ActivationDropout`; None is the identity.
    num_features : int, optional
        Size of x's last axis. The layer then has a ``bias`` of this length, 0 at first; make the linear layer before it
        without a bias.
    order : {"after", "before"}
        Dropout after the activation, or before it: ``residual + phi(D(x + bias))``.
    shared_axes : sequence of int
        As in :class:`Dropout`; ``range(1, rank)`` drops the branch of whole samples (stochastic depth).
    generator : Generator, optional
        Source of the masks, as in :class:`Dropout`.
    dtype : {"float32", "float64"}
        Dtype of the bias: float64 for float64 input, float32 for all others.

    Attributes
    ----------
    first_sample : int
        As in :class:`Dropout`.

    Raises
    ------
    TypeError
        For a wrong type of these.
    ValueError
        For p outside [0, 1] or NaN, an unknown activation or order, an axis that comes twice, or no feature.
    """

    def __init__(
        self,
        p: float = 0.5,
        activation: str | None = None,
        *,
        num_features: int | None = None,
        order: str = "after",
        shared_axes: Sequence[int] = (),
        generator: random.Generator | None = None,
        dtype: DTypeLike = "float32",
    ) -> None:
        super().__init__()
        self.p = check_probability(p)
        self.activation = None if activation is None else check_activation(activation)
        self.order, self.shared_axes = check_order(order), check_shared_axes(shared_axes)
        self.generator = check_generator(generator)
        self.num_features, own = None, parameter_dtype(dtype)
        if num_features is not None:
            self.num_features = check_integer(num_features, "num_features", 1, 2**63 - 1)
            self.parameters["bias"] = np.zeros(self.num_features, own)
        self.first_sample = 0
        self._taken: Array = None
        self._taken_again: tuple[Any, ...] = ()

    def forward(self, x: Array, residual: Array, sample_ids: Array = None) -> Array:  # type: ignore[override]
        """The sum of the residual and the branch.

        Parameters
        ----------
        x, residual : array
            Any shape; both of the same shape and dtype.
        sample_ids : array of int64, shape (x.shape[0],), optional
            As in :meth:`Dropout.forward`.

        Returns
        -------
        array
            x's shape and dtype.

        Raises
        ------
        TypeError, ValueError
            For a wrong array type, dtype or shape; the generator then stays as it was.
        """
        options: Options = {"bias": self.parameters.get("bias"), "activation": self.activation, "order": self.order}
        if not self.training:
            y, self._saved = dropout_add_forward(x, residual, 0.0, 0, 0, **options)
            return y
        start = 0 if sample_ids is not None else first_decision(x, self.first_sample, shared_axes=self.shared_axes)
        options |= {"shared_axes": self.shared_axes, "sample_ids": sample_ids, "start": start}
        (y, saved), taken = drawn(self, dropout_add_forward, x, residual, self.p, **options)
        self._saved = saved if taken is None else saved.with_rng_state(taken)
        return y

    def backward(self, dy: Array) -> tuple[Array, Array]:
        """Gradients of x and of the residual; assigns :attr:`gradients` of the bias.

        Parameters
        ----------
        dy : array
            Gradient of the last forward's output, of its shape and dtype.

        Returns
        -------
        dx : array
            x's shape and dtype.
        dresidual : array
            dy itself, not a copy.

        Raises
        ------
        TypeError, ValueError
            If dy has another array type, dtype or shape.
        RuntimeError
            Before any forward, or if the gradient depends on x and this library has written to x since.
        """
        dx, dresidual, dbias = dropout_add_backward(dy, self._saved_by_forward())
        self.gradients = {} if dbias is None else {"bias": dbias}
        return dx, dresidual

    def _configuration(self) -> str:
        activation = "" if self.activation is None else f", {self.activation!r}"
        features = "" if self.num_features is None else f", num_features={self.num_features}"
        order = "" if self.order == "after" else f", order={self.order!r}"
        shared = f", shared_axes={self.shared_axes}" if self.shared_axes else ""
        return f"p={self.p}{activation}{features}{order}{shared}"
