"""Types of command line arguments: they turn text into a value, or raise a message for argparse."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

#: What commands are added to.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no other name


def integer(low: int, high: int) -> Callable[[str], int]:
    """A whole number in ``low .. high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be in {low} .. {high}, got {value}")
        return value

    return parse


def probability(text: str) -> float:
    """A number in [0, 1]."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"dropout probability has to be between 0 and 1, but got {text}")
    return value


def positive(text: str) -> float:
    """A finite number greater than 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def file(text: str) -> Path:
    """The path of a file; empty text is an error."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file, got ''")
    return Path(text)


def folder(text: str) -> Path:
    """The path of a folder; empty text is an error, although Python takes it for the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got '' (. is the working directory)")
    return Path(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
