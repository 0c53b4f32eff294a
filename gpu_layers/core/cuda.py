"""The only module that imports CuPy, when a CuPy array or the CUDA backend asks for it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np

from gpu_layers.core.array import Array

P = ParamSpec("P")
R = TypeVar("R")

INSTALL_ADVICE = "pip install 'gpu-layers[cuda12]' or 'gpu-layers[cuda13]', to match the driver's CUDA version"


def import_cupy() -> ModuleType:
    """CuPy.

    Raises
    ------
    RuntimeError
        If it is not installed or does not load.
    """
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(f"the CUDA backend needs CuPy ({error}): {INSTALL_ADVICE}") from error
    # A broken installation, or a cache folder that cannot be made, may raise anything.
    except Exception as error:
        raise RuntimeError(f"the CUDA backend needs CuPy, which does not load ({_told(error)})") from error
    if not hasattr(cupy, "ndarray"):  # a folder of that name, in the working directory for instance
        place = getattr(cupy, "__file__", None) or cupy
        raise RuntimeError(f"the CUDA backend needs CuPy, but {place} is another cupy: {INSTALL_ADVICE}")
    return cupy


def _told(error: Exception) -> str:
    # Errors of CUDA begin with their names.
    return str(error) if str(error).startswith("cuda") else f"{type(error).__name__}: {error}"


def is_cupy_array(x: object) -> bool:
    """Whether ``x`` is a CuPy array. It does not import CuPy: if there is such an array, CuPy has been imported."""
    # Another module may have that name.
    return isinstance(x, getattr(sys.modules.get("cupy"), "ndarray", ()))


def array_module(x: object) -> ModuleType:
    """The module of ``x``: ``numpy`` or ``cupy``."""
    return sys.modules["cupy"] if is_cupy_array(x) else np


def place_of(x: Array) -> contextlib.AbstractContextManager[Any]:
    """A context in which the array library works on the device of x.

    Programs of kernels do not need it. CuPy's own operations run on the current device and refuse arrays of another.
    """
    if not is_cupy_array(x) or x.data.device_id == sys.modules["cupy"].cuda.device.get_device_id():
        return _NOWHERE_ELSE
    return x.device


def placed(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run on the device of its first argument; see :func:`place_of`."""

    name = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        place = place_of(arguments[0] if arguments else options.get(name))
        if place is _NOWHERE_ELSE:
            return function(*arguments, **options)
        with place:
            return function(*arguments, **options)

    return run


#: The GPU on which a graph is being made; None outside :func:`gpu_layers.capture`.
graph_device: ContextVar[int | None] = ContextVar("gpu_layers_graph_device", default=None)

_NOWHERE_ELSE = contextlib.nullcontext()


def to_host(x: Array) -> np.ndarray:
    """The array in the host's memory; waits for pending writes."""
    return x.get() if is_cupy_array(x) else x


def place_of_work(x: Array) -> Any:
    """What a result of x belongs to: its GPU, which must be current, and the stream there; or None.

    Of a stream the handle and the thread: every thread's own default stream has the same handle.
    """
    if not is_cupy_array(x):
        return None
    return x.data.device_id, sys.modules["cupy"].cuda.get_current_stream().ptr, threading.get_ident()


def refuse_capture(x: Array, what: str, reason: str) -> None:
    """RuntimeError if x is on a GPU whose current stream records a graph, or will do so within ``capture``."""
    if not is_cupy_array(x):
        return
    if graph_device.get() is not None or sys.modules["cupy"].cuda.get_current_stream().is_capturing():
        raise RuntimeError(f"{what} cannot be captured: {reason}")


def require_gpu() -> ModuleType:
    """CuPy, on a machine where it finds a GPU.

    Raises
    ------
    RuntimeError
        If CuPy is missing or finds no GPU.
    """
    cupy = import_cupy()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    # An error of the driver, or of a folder that is only named cupy.
    except Exception as error:
        raise RuntimeError(f"no usable GPU: {_told(error)}") from error
    if count == 0:
        raise RuntimeError("no usable GPU: the driver lists none")
    return cupy


def gpu_is_lost() -> bool:
    """Whether the current GPU does no more work for this process, as after an access outside its memory.

    Such an error stays: everything that this process asks of the GPU then fails.
    """
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return False
    try:
        cupy.cuda.runtime.deviceSynchronize()
    except cupy.cuda.runtime.CUDARuntimeError:
        return True
    return False
