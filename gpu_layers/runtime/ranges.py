"""Named ranges around the forward and backward of every layer, for a profiler's time line.

Switching ranges on wraps the methods of layers; switching them off restores the plain methods.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from gpu_layers.core.cuda import import_cupy

_PASSES = ("forward", "backward")
_VARIABLE = "GPU_LAYERS_PROFILE_RANGES"


class _State:
    """The layer classes, and the functions that begin and end a range."""

    def __init__(self) -> None:
        self.classes: list[type] = []
        self.begin: Callable[[str], None] | None = None
        self.end: Callable[[], None] | None = None

    @property
    def is_on(self) -> bool:
        return self.begin is not None


_state = _State()


def add_layer_class(layer_class: type) -> None:
    """Put ranges around the forward and backward of this class whenever they are on."""
    _state.classes.append(layer_class)
    if os.environ.get(_VARIABLE) == "1" and not _state.is_on:
        profile_ranges(True)
    elif _state.is_on:
        _wrap(layer_class)


def profile_ranges(enabled: bool = True) -> None:
    """Put NVTX ranges such as ``BatchNorm2d.forward`` around the passes of layers, for Nsight Systems and Compute.

    ``GPU_LAYERS_PROFILE_RANGES=1`` in the environment does the same from the start. Switched off they cost nothing.

    Parameters
    ----------
    enabled : bool

    Raises
    ------
    RuntimeError
        Without CuPy, which brings NVTX.
    """
    if enabled:
        nvtx = import_cupy().cuda.nvtx
        _switch_on(nvtx.RangePush, nvtx.RangePop)
    else:
        _switch_off()


def _switch_on(begin: Callable[[str], None], end: Callable[[], None]) -> None:
    _switch_off()
    _state.begin, _state.end = begin, end
    for layer_class in _state.classes:
        _wrap(layer_class)


def _switch_off() -> None:
    _state.begin = _state.end = None
    for layer_class in _state.classes:
        for name in _PASSES:
            original = getattr(layer_class.__dict__.get(name), "without_range", None)
            if original is not None:
                setattr(layer_class, name, original)


def _wrap(layer_class: type) -> None:
    for name in _PASSES:
        if name in layer_class.__dict__:
            setattr(layer_class, name, _ranged(layer_class.__dict__[name], name))


def _ranged(method: Callable[..., object], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def within_range(self: object, *args: object, **kwargs: object) -> Any:
        begin, end = _state.begin, _state.end
        if begin is None or end is None:
            return method(self, *args, **kwargs)
        begin(f"{type(self).__name__}.{name}")
        try:
            return method(self, *args, **kwargs)
        finally:
            end()

    within_range.without_range = method  # type: ignore[attr-defined]
    return within_range
