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
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError(f"the CUDA backend needs CuPy ({error}): {INSTALL_ADVICE}") from error
    # A broken installation, or a cache folder that cannot be made, raises whatever the libraries below do.
    except Exception as error:
        raise RuntimeError(f"the CUDA backend needs CuPy, which does not load ({_told(error)})") from error
    if not hasattr(cupy, "ndarray"):  # a folder of that name, in the working directory for instance
        place = getattr(cupy, "__file__", None) or cupy
        raise RuntimeError(f"the CUDA backend needs CuPy, but {place} is another cupy: {INSTALL_ADVICE}")
    return cupy


def _told(error: Exception) -> str:
    # Those of CUDA begin with their own names.
    return str(error) if str(error).startswith("cuda") else f"{type(error).__name__}: {error}"


def is_cupy_array(x: object) -> bool:
    """Whether ``x`` is a CuPy array; does not import CuPy (where there is such an array, it was imported)."""
    # A module of that name need not be CuPy.
    return isinstance(x, getattr(sys.modules.get("cupy"), "ndarray", ()))


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
    # A driver's answer, or that of a folder which is only called cupy.
    except Exception as error:
        raise RuntimeError(f"no usable GPU: {_told(error)}") from error
    if count == 0:
        raise RuntimeError("no usable GPU: the driver lists none")
    return cupy
