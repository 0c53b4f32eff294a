"""Checks of arguments, before anything is launched or written. The messages are PyTorch's where it has one."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy as np

from gpu_layers.reference.activation import ACTIVATIONS
from gpu_layers.runtime.kernel import FLOAT_DTYPES


def check_dtype(x: Any, name: str = "input") -> None:
    """TypeError unless x holds float16, bfloat16, float32 or float64."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_gradient(dy: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise unless dy has the shape and dtype of the output it belongs to."""
    if dy.dtype != dtype:
        raise TypeError(f"dy must have the output's dtype {np.dtype(dtype)}, got {dy.dtype}")
    if dy.shape != tuple(shape):
        raise ValueError(f"dy must have the output's shape {list(shape)}, got {list(dy.shape)}")


def check_probability(p: Any) -> float:
    """A dropout probability as a float.

    Raises
    ------
    TypeError
        If it is no real number.
    ValueError
        If it is outside [0, 1] or NaN.
    """
    probability = check_number(p, "dropout probability")
    if not 0 <= probability <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return probability


def check_number(value: Any, name: str) -> float:
    """A real number as a float; TypeError if it is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_eps(eps: Any) -> float:
    """Batch norm's eps as a float: TypeError if it is no real number, ValueError unless positive and finite."""
    number = check_number(eps, "eps")
    if not 0 < number < float("inf"):
        raise ValueError(f"batch_norm eps must be positive, but got {eps}")
    return number


def check_integer(value: Any, name: str, low: int, high: int) -> int:
    """An integer in ``low .. high``.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is out of range.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} must be in {low} .. {high}, got {number}")
    return number


def check_uint64(value: Any, name: str) -> int:
    """An integer in ``0 .. 2**64 - 1``."""
    return check_integer(value, name, 0, 2**64 - 1)


def check_out(out: Any, x: Any) -> None:
    """Raise unless out can take a result of x's shape and dtype."""
    if out.dtype != x.dtype:
        raise TypeError(f"out must have the input's dtype {x.dtype}, got {out.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out must have the input's shape {list(x.shape)}, got {list(out.shape)}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    """The value, if it is one of these names; ValueError for any other."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_activation(activation: Any) -> str:
    """The name of an activation; ValueError for any other."""
    return check_choice(activation, "activation", tuple(ACTIVATIONS))
