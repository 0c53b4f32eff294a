"""Checks of numbers and names that callers pass."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy as np


def check_number(value: object, name: str) -> float:
    """A real number as a float; TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_finite(value: object, name: str) -> float:
    """A finite number as a float. TypeError if it is not a real number, ValueError for NaN and infinity."""
    number = check_number(value, name)
    if not abs(number) < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def check_integer(value: Any, name: str, low: int, high: int) -> int:
    """An integer in ``low .. high``.

    Raises
    ------
    TypeError
        If it is not an integer.
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


def check_uint64(value: object, name: str) -> int:
    """An integer in ``0 .. 2**64 - 1``."""
    return check_integer(value, name, 0, 2**64 - 1)


def check_choice(value: object, name: str, choices: tuple[str, ...]) -> str:
    """The value, if it is one of these names; otherwise ValueError."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
