"""matplotlib for the commands: the same picture, whatever the user's settings."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from gpu_layers.training.extras import import_extra

#: With these the import reads neither a backend that this Python lacks nor an unreadable file of settings.
_NEUTRAL = {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}


@contextmanager
def fixed_settings(style: Mapping[str, object] | None = None, *, extra: str = "train") -> Iterator[Any]:
    """matplotlib with its own defaults and this style, until the end of the block.

    The user's settings may ask for TeX, for a notebook's backend or for missing fonts. Draw with
    ``Figure.savefig(..., backend="agg")`` or ``"svg"``, not with pyplot: no window system, no global state.

    Parameters
    ----------
    style : mapping of str to object, optional
        Settings by matplotlib's names.
    extra : {"train", "study"}
        The extra that brings matplotlib.

    Yields
    ------
    module
        matplotlib.

    Raises
    ------
    RuntimeError
        If matplotlib is not installed.
    """
    matplotlib = _matplotlib(extra)
    with warnings.catch_warnings():
        # A warning for each letter that its font lacks, such as in a Chinese file name: it draws a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # Warnings of deprecated defaults; savefig is told the backend.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib")
        defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
        with matplotlib.rc_context({**defaults, **(style or {})}):
            yield matplotlib


def _matplotlib(extra: str) -> ModuleType:
    try:
        return import_extra("matplotlib", extra=extra)
    except (RuntimeError, MemoryError):
        raise
    # The import reads the user's settings, which may be anything.
    except Exception:
        # A second import would find the modules that the first one left.
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        before = {name: os.environ.get(name) for name in _NEUTRAL}
        os.environ.update(_NEUTRAL)
        try:
            return import_extra("matplotlib", extra=extra)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
