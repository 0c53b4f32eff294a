"""matplotlib as the commands draw with it: the same picture whatever the user's settings are."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gpu_layers.training.extras import import_extra

#: What makes the import read neither a backend that this Python lacks nor a file of settings that cannot be read.
_NEUTRAL = {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}


@contextmanager
def fixed_settings(style: Mapping[str, Any] | None = None, *, extra: str = "train") -> Iterator[Any]:
    """matplotlib with its own defaults and this style, until the end of the block.

    The user's settings may ask for TeX, for a notebook's backend or for fonts that are not there. Draw with
    ``Figure.savefig(..., backend="agg")`` or ``"svg"``, not with pyplot: no window system, no global state.

    Parameters
    ----------
    style : mapping of str to object, optional
        Settings by matplotlib's names.
    extra : {"train", "study"}
        Which extra brings matplotlib.

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
        # One for each letter that its own font lacks, a Chinese file name's: it draws a box instead.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # Of defaults that are on their way out; which backend is used is told to savefig.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib")
        defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
        with matplotlib.rc_context({**defaults, **(style or {})}):
            yield matplotlib


def _matplotlib(extra: str) -> Any:
    try:
        return import_extra("matplotlib", extra=extra)
    except (RuntimeError, MemoryError):
        raise
    # The user's settings, which its import reads, may be anything.
    except Exception:
        # What it has left behind would take the place of what a second import makes.
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
