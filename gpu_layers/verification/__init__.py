"""Every kernel against the reference, on this machine: what ``gpu-layers verify`` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.cuda import gpu_is_lost, require_gpu
from gpu_layers.runtime.nvrtc import Architecture, options
from gpu_layers.verification.activation_dropout import activation_dropout_cases, dropout_add_cases
from gpu_layers.verification.batch_norm import batch_norm_cases, double_backward_cases
from gpu_layers.verification.batch_norm_max_pool import batch_norm_max_pool_cases
from gpu_layers.verification.batch_norm_variants import (
    ghost_batch_norm_cases,
    padded_batch_norm_cases,
    sync_batch_norm_cases,
)
from gpu_layers.verification.comparison import Case, Difference, compare
from gpu_layers.verification.dropout import (
    alpha_dropout_cases,
    channel_dropout_cases,
    channels_last_dropout_cases,
    draw_cases,
    dropout_cases,
    residual_dropout_cases,
    sample_dropout_cases,
    shared_dropout_cases,
)
from gpu_layers.verification.elementwise import relu_cases
from gpu_layers.verification.pooling import (
    avg_pool_cases,
    fractional_max_pool_cases,
    integer_max_pool_cases,
    lp_pool_cases,
    max_pool_cases,
    max_unpool_cases,
)

__all__ = ["Backend", "Case", "Difference", "all_cases", "cuda_backend", "differences", "emulated_backend"]


_CASES = (
    dropout_cases,
    channel_dropout_cases,
    channels_last_dropout_cases,
    residual_dropout_cases,
    alpha_dropout_cases,
    sample_dropout_cases,
    shared_dropout_cases,
    draw_cases,
    relu_cases,
    activation_dropout_cases,
    dropout_add_cases,
    batch_norm_cases,
    double_backward_cases,
    batch_norm_max_pool_cases,
    padded_batch_norm_cases,
    ghost_batch_norm_cases,
    sync_batch_norm_cases,
    max_pool_cases,
    integer_max_pool_cases,
    fractional_max_pool_cases,
    avg_pool_cases,
    lp_pool_cases,
    max_unpool_cases,
)


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


def all_cases() -> Iterator[Case]:
    """The cases of every operation."""
    for cases in _CASES:
        yield from cases()


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
