"""Activations in NumPy: the definition of correct."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.results import delivered

__all__ = ["relu_backward", "relu_forward"]


@ieee
def relu_forward(x: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``max(x, 0)``; NaN stays NaN.

    Parameters
    ----------
    x : ndarray
        Any floating dtype and layout.
    out : ndarray, optional
        C-contiguous array to fill; may be ``x`` itself.

    Returns
    -------
    y : ndarray
    gradient_bits : ndarray of uint8, shape (ceil(size / 8),)
        Bit ``i & 7`` of byte ``i >> 3`` is set where element i (flat, C order) is positive, or NaN.
    """
    y = np.empty(x.shape, x.dtype) if out is None else out
    clipped = x <= 0
    # Not np.maximum: which zero that returns for -0 is unspecified, and here a result of 0 is always +0.
    y[...] = np.where(clipped, x.dtype.type(0), x)
    return y, np.packbits(~clipped, bitorder="little")


@ieee
def relu_backward(dy: np.ndarray, gradient_bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``dy`` where the forward set the element's bit, +0 elsewhere."""
    passes = np.unpackbits(gradient_bits, count=dy.size, bitorder="little").astype(bool)
    dx = np.empty(dy.shape, dy.dtype)
    dx[...] = np.where(passes.reshape(dy.shape), dy, dy.dtype.type(0))
    return delivered(dx, out)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _sigmoid_derivative(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return e / (1 + e) ** 2


def _tanh_derivative(x: np.ndarray) -> np.ndarray:
    return 4 * _sigmoid_derivative(2 * x)


def _normal_distribution(x: np.ndarray) -> np.ndarray:
    # NumPy has no erfc; erfc, other than 1 + erf, keeps its precision where x is far below 0.
    exact = x * -np.sqrt(np.longdouble(0.5))
    z = exact.astype(x.dtype)
    erfc = np.fromiter(map(math.erfc, z.reshape(-1).tolist()), x.dtype, z.size).reshape(x.shape)
    # Which magnifies what z is rounded by: its derivative is about -2 z times erfc(z) from 1 on. (Nothing is left
    # where the processor has no wider numbers than float64.)
    rest = np.where(z > 1, -2 * z * (exact - z).astype(x.dtype), 0)
    return 0.5 * np.where(erfc > 0, erfc + erfc * rest, erfc)


def _normal_density(x: np.ndarray) -> np.ndarray:
    exponent = np.square(x, dtype=np.longdouble) * -0.5
    return (np.exp(exponent) / np.sqrt(2 * np.longdouble(math.pi))).astype(x.dtype)


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes
    ----------
    forward, derivative : callable
        Of an array.
    is_exact : bool
        Whether it moves or scales values: computed in the accumulation dtype then, and otherwise in float64.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    derivative: Callable[[np.ndarray], np.ndarray]
    is_exact: bool = False


#: By name; leaky_relu has a slope of 0.01.
ACTIVATIONS = {
    "relu": Activation(
        lambda x: np.where(x <= 0, x.dtype.type(0), x), lambda x: np.where(x <= 0, 0, 1).astype(x.dtype), True
    ),
    "leaky_relu": Activation(
        lambda x: np.where(x > 0, x, x * x.dtype.type(0.01)),
        lambda x: np.where(x > 0, x.dtype.type(1), x.dtype.type(0.01)),
        True,
    ),
    "sigmoid": Activation(_sigmoid, _sigmoid_derivative),
    "tanh": Activation(np.tanh, _tanh_derivative),
    "gelu": Activation(
        lambda x: x * _normal_distribution(x), lambda x: _normal_distribution(x) + x * _normal_density(x)
    ),
    "silu": Activation(lambda x: x * _sigmoid(x), lambda x: _sigmoid(x) + x * _sigmoid_derivative(x)),
    "identity": Activation(lambda x: x, np.ones_like, True),
}
