"""Every kernel against the reference, on this machine: what ``gpu-layers verify`` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from gpu_layers.catalogue import Case, all_cases
from gpu_layers.core.cuda import gpu_is_lost, require_gpu
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.nvrtc import Architecture, options
from gpu_layers.verification.comparison import Difference, compare

__all__ = ["Backend", "Case", "Difference", "all_cases", "cuda_backend", "differences", "emulated_backend"]


@dataclass(frozen=True)
class Backend:
    """Where the kernels run.

    Attributes
    ----------
    name : str
    place : callable
        Takes a NumPy array to where the kernels take it.
    activate : callable
        Gives the context in which operations run there.
    is_lost : callable
        Whether nothing more can run there, after an error of one operation.
    """

    name: str
    place: Callable[[Any], Any]
    activate: Callable[[], AbstractContextManager]
    is_lost: Callable[[], bool] = lambda: False


def emulated_backend(**options: Any) -> Backend:
    """The kernels executed on the CPU; options as those of ``use_backend("emulated")``."""
    return Backend("emulated", lambda array: array, lambda: use_backend("emulated", **options))


def cuda_backend() -> Backend:
    """The kernels on CuPy's current GPU.

    Raises
    ------
    RuntimeError
        If there is none, or what kernels are compiled with is missing.
    """
    cupy = require_gpu()
    options(Architecture(int(cupy.cuda.Device().compute_capability)))
    return Backend("cuda", cupy.asarray, lambda: use_backend("cuda"), gpu_is_lost)


def differences(case: Case, backend: Backend) -> Iterable[Difference]:
    """Run a case by the reference and by a backend, and compare every result."""
    inputs = case.inputs()
    with use_backend("reference"):
        expected = case.run(inputs)
        bounds = case.bounds(inputs, expected)
    placed = {name: backend.place(array) for name, array in inputs.items()}
    with backend.activate():
        actual = case.run(placed)
    return [compare(name, actual[name], result, bounds.get(name)) for name, result in expected.items()]
