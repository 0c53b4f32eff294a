"""What training needs and the core does not: the packages of the extra ``train``."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_ADVICE = "pip install 'gpu-layers[train]'"


def import_extra(module: str) -> Any:
    """A module of the extra ``train``.

    Raises
    ------
    RuntimeError
        If it is not installed; says what to do.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(f"training needs {module.split('.')[0]} ({error}): {_ADVICE}") from error


def require_extras(*packages: str) -> None:
    """RuntimeError unless all of these packages are installed; imports none, so it costs nothing to ask early."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise RuntimeError(f"training needs {', '.join(missing)}: {_ADVICE}")
