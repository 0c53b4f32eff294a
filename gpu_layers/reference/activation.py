"""Activations in NumPy: the definition of correct."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from gpu_layers.reference.ieee import ieee
from gpu_layers.reference.results import delivered
from gpu_layers.reference.select import kept_values

__all__ = ["relu_backward", "relu_forward"]


@ieee
def relu_forward(x: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``max(x, 0)``; NaN stays NaN.

    Parameters
    ----------
    x : ndarray
        Any floating dtype and layout.
    out : ndarray, optional
        Array to fill; may be ``x`` itself.

    Returns
    -------
    y : ndarray
    gradient_bits : ndarray of uint8, shape (ceil(size / 8),)
        Bit ``i & 7`` of byte ``i >> 3`` is set where element i (flat, C order) is positive, or NaN.
    """
    passes = ~(x <= 0)
    # Not np.maximum: which zero that returns for -0 is unspecified, and here a result of 0 is always +0.
    return delivered(kept_values(x, passes), out), np.packbits(passes, bitorder="little")


@ieee
def relu_backward(dy: np.ndarray, gradient_bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """``dy`` where the forward set the element's bit, +0 elsewhere."""
    passes = np.unpackbits(gradient_bits, count=dy.size, bitorder="little").view(bool)
    return delivered(kept_values(dy, passes.reshape(dy.shape)), out)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _sigmoid_derivative(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return e / (1 + e) ** 2


def _tanh_derivative(x: np.ndarray) -> np.ndarray:
    return 4 * _sigmoid_derivative(2 * x)


def _normal_distribution(x: np.ndarray) -> np.ndarray:
    """To the last bits of float64; the curve of :func:`_gelu` is 10 times as fast."""
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


# The ratio of the normal distribution to exp(-y^2 / 2), at -y, is tabulated so many times in a unit, up to where the
# distribution is 0 in float64.
_NODES = 256
_LAST_NODE = 39
_DENSITY = 1 / math.sqrt(2 * math.pi)
# Values that fit into a processor's cache with all that is computed of them.
_CHUNK = 1 << 13


def _ratio(y: float) -> float:
    """``P(-y) exp(y^2 / 2)``, P the normal distribution."""
    if y < 37:
        return 0.5 * math.erfc(y * math.sqrt(0.5)) * math.exp(y * y / 2)
    # Of the asymptotic series the next term is below 2^-42 of the first.
    return _DENSITY / y * (1 - 1 / y**2 + 3 / y**4 - 15 / y**6 + 105 / y**8)


@cache
def _ratios() -> np.ndarray:
    return np.array([_ratio(node / _NODES) for node in range(_LAST_NODE * _NODES + 1)])


def _distribution_and_bell(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The normal distribution, and ``exp(-x^2 / 2)``, of some float64 values, to a relative error of 2^-40.

    The ratio m of the two is smooth: ``m' = y m - 1 / sqrt(2 pi)``, from which all derivatives follow. Of Taylor's
    series around the nearest node, at most 1 / 512 away, the first term that is left out is 2^-49.
    """
    y = np.minimum(np.abs(x), float(_LAST_NODE))
    node = np.rint(np.fmin(y, _LAST_NODE) * _NODES)
    first = _ratios()[node.astype(np.int32)]
    node *= 1 / _NODES
    d = y - node
    second = node * first - _DENSITY
    third = first + node * second
    fourth = 2 * second + node * third
    fifth = 3 * third + node * fourth
    ratio = first + d * (second + d * (third * (1 / 2) + d * (fourth * (1 / 6) + d * (fifth * (1 / 24)))))
    bell = np.exp(y * y * -0.5)
    tail = bell * ratio
    # 1 - tail on the right. np.where takes as long as all of the above.
    right = (x > 0).astype(np.float64)
    return right + tail * (1 - 2 * right), bell


def _in_chunks(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """The function of values, some at a time: each array of temporary values stays in the processor's cache."""
    found = np.empty(x.shape, x.dtype)
    source, target = np.ascontiguousarray(x).reshape(-1), found.reshape(-1)
    for first in range(0, source.size, _CHUNK):
        chunk = slice(first, first + _CHUNK)
        target[chunk] = function(source[chunk])
    return found


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * _distribution_and_bell(x)[0]


def _gelu_derivative(x: np.ndarray) -> np.ndarray:
    distribution, bell = _distribution_and_bell(x)
    return distribution + x * (bell * _DENSITY)


_Function = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    Attributes
    ----------
    forward, derivative : callable
        Of an array.
    is_exact : bool
        Whether it moves or scales values: computed in the accumulation dtype then, and otherwise in float64.
    rounded : tuple of callable, optional
        Both, of float64 values, for results that are rounded to a smaller type: with a relative error of 2^-40.
    """

    forward: _Function
    derivative: _Function
    is_exact: bool = False
    rounded: tuple[_Function, _Function] | None = None

    def forward_of(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Of values of the accumulation dtype that belong to elements of a dtype."""
        return self._of(values, dtype, 0)

    def derivative_of(self, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """As :meth:`forward_of`."""
        return self._of(values, dtype, 1)

    def _of(self, values: np.ndarray, dtype: np.dtype, which: int) -> np.ndarray:
        functions = (self.forward, self.derivative)
        if self.is_exact:
            return functions[which](values)
        if self.rounded is not None and dtype != np.float64:
            functions = self.rounded
        return _in_chunks(functions[which], values.astype(np.float64, copy=False))


#: By name; leaky_relu has a slope of 0.01.
ACTIVATIONS = {
    "relu": Activation(lambda x: kept_values(x, ~(x <= 0)), lambda x: (~(x <= 0)).astype(x.dtype), True),
    "leaky_relu": Activation(
        lambda x: np.where(x > 0, x, x * x.dtype.type(0.01)),
        lambda x: np.where(x > 0, x.dtype.type(1), x.dtype.type(0.01)),
        True,
    ),
    "sigmoid": Activation(_sigmoid, _sigmoid_derivative),
    "tanh": Activation(np.tanh, _tanh_derivative),
    "gelu": Activation(
        lambda x: x * _normal_distribution(x),
        lambda x: _normal_distribution(x) + x * _normal_density(x),
        rounded=(_gelu, _gelu_derivative),
    ),
    "silu": Activation(lambda x: x * _sigmoid(x), lambda x: _sigmoid(x) + x * _sigmoid_derivative(x)),
    "identity": Activation(lambda x: x, np.ones_like, True),
}
