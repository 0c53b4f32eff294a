"""What a package exports: the names that its modules list."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any


def exported(package: str) -> dict[str, Any]:
    """The objects that the modules of a package name in ``__all__``, by name."""
    found: dict[str, Any] = {}
    for one in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}."):
        module = importlib.import_module(one.name)
        found |= {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    return dict(sorted(found.items()))
