"""The one module that imports CuPy, and only when a CuPy array or the CUDA backend asks for it."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

INSTALL_ADVICE = "pip install 'gpu-layers[cuda12]' or 'gpu-layers[cuda13]', to match the driver's CUDA version"


def import_cupy() -> Any:
    """CuPy.

    Raises
    ------
    RuntimeError
        If it is not installed or does not load.
    """
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(f"the CUDA backend needs CuPy ({error}): {INSTALL_ADVICE}") from error


def is_cupy_array(x: object) -> bool:
    """Whether ``x`` is a CuPy array; does not import CuPy (where there is such an array, it was imported)."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(x, cupy.ndarray)


def array_module(x: object) -> Any:
    """``numpy`` or ``cupy``, whichever made ``x``."""
    return sys.modules["cupy"] if is_cupy_array(x) else np


def require_gpu() -> Any:
    """CuPy, on a machine where it finds a GPU.

    Raises
    ------
    RuntimeError
        If CuPy is missing or finds no GPU.
    """
    cupy = import_cupy()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"no usable GPU: {error}") from error
    if count == 0:
        raise RuntimeError("no usable GPU: the driver lists none")
    return cupy


def gpu_is_lost() -> bool:
    """Whether the current GPU does no more work for this process, as after an access outside of its memory.

    Such an error stays: whatever is asked of the GPU from then on fails with it, in this process.
    """
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return False
    try:
        cupy.cuda.runtime.deviceSynchronize()
    except cupy.cuda.runtime.CUDARuntimeError:
        return True
    return False
