"""Packages that the commands need and the core does not: those of the extras ``train`` and ``study``."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_WHO_NEEDS = {"train": "training", "study": "the study"}


def import_extra(module: str, *, extra: str = "train") -> Any:
    """A module of an extra.

    Parameters
    ----------
    module : str
    extra : {"train", "study"}

    Raises
    ------
    RuntimeError
        If it is not installed; the message says what to do.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(f"{_WHO_NEEDS[extra]} needs {module.split('.')[0]} ({error}): {_advice(extra)}") from error


def require_extras(*packages: str, extra: str = "train") -> None:
    """RuntimeError unless all of these packages are installed. It imports none, so it costs nothing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise RuntimeError(f"{_WHO_NEEDS[extra]} needs {', '.join(missing)}: {_advice(extra)}")


def _advice(extra: str) -> str:
    return f"pip install 'gpu-layers[{extra}]'"
