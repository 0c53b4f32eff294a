"""The backend of an operation: the NumPy reference, or the kernels, on a GPU or emulated."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import is_cupy_array, require_gpu

if TYPE_CHECKING:
    from gpu_layers.emulator import Schedule
    from gpu_layers.runtime.kernel import Kernel

BACKENDS = ("reference", "emulated", "cuda")


class Executor(Protocol):
    """What runs kernels on NumPy arrays."""

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: list[object],
        shared_bytes: int,
        cooperative: bool,
    ) -> None:
        """Run a kernel, or do something else in its place."""


@dataclass(frozen=True)
class _Choice:
    name: str
    emulation: Executor | None = None


_forced: ContextVar[_Choice | None] = ContextVar("gpu_layers_backend", default=None)


@contextmanager
def use_backend(
    name: str,
    *,
    check: bool = False,
    schedule: Schedule | None = None,
    sanitizer: str | None = None,
    record: Callable[..., None] | None = None,
) -> Iterator[None]:
    """Force the backend of every operation in a ``with`` block, in this thread or task.

    Parameters
    ----------
    name : {"reference", "emulated", "cuda"}
        The NumPy reference, the kernels executed on the CPU, or the kernels on a GPU.
    check : bool
        This and the following are options of the emulated backend. Whether to check every memory access, and to find
        data races.
    schedule : gpu_layers.emulator.Schedule, optional
        The order of threads and blocks.
    sanitizer : {"asan", "ubsan"}, optional
        Run under a sanitizer.
    record : callable, optional
        Called with the kernel and its Trace after each checked launch.

    Raises
    ------
    ValueError
        If there is no such backend, or for options that exclude each other.
    TypeError
        For an option of another backend than the emulated one, or a schedule of another type.
    RuntimeError
        If the backend is missing on this machine; the message says what to install.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    given = {"check": check, "schedule": schedule, "sanitizer": sanitizer, "record": record}
    options = {option: value for option, value in given.items() if value is not None and value is not False}
    if options and name != "emulated":
        raise TypeError(f"the {name} backend takes no options, got {', '.join(options)}")
    if name == "cuda":
        require_gpu()
    emulation = None
    if name == "emulated":
        emulation = importlib.import_module("gpu_layers.runtime.emulation").Emulation(**options)
    with _force(_Choice(name, emulation)):
        yield


@contextmanager
def use_executor(executor: Executor) -> Iterator[None]:
    """Send the launches of NumPy arrays in a ``with`` block to an object that lists or times them.

    Parameters
    ----------
    executor : Executor
    """
    with _force(_Choice("emulated", executor)):
        yield


#: What the innermost block around the caller forces, for :func:`back_on`; None outside of all.
forced_backend = _forced.get


def back_on(choice: _Choice | None) -> AbstractContextManager[None]:
    """A block in which the same backend is forced as where :func:`forced_backend` gave this: for a backward."""
    return _force(choice)


@contextmanager
def _force(choice: _Choice | None) -> Iterator[None]:
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def emulation() -> Executor:
    """The object that runs kernels on NumPy arrays here.

    Raises
    ------
    RuntimeError
        Outside ``use_backend("emulated")``.
    """
    choice = _forced.get()
    if choice is None or choice.emulation is None:
        raise RuntimeError('kernels run on NumPy arrays only within use_backend("emulated")')
    return choice.emulation


def backend_for(array: Array, *others: object, optional: tuple[object, ...] = ()) -> ModuleType:
    """The backend for these arrays: the module ``gpu_layers.reference`` or ``gpu_layers.kernels``.

    Parameters
    ----------
    array, *others
        NumPy or CuPy arrays, all of one kind.
    optional : tuple
        Arrays of the same kind, or None.

    Raises
    ------
    TypeError
        If one is not an array, if kinds are mixed, or if the forced backend does not take them.
    """
    kind = type(array)
    floor = _FLOORS.get(kind)
    if floor is not None and _forced.get() is None:
        for one in others:
            if type(one) is not kind:
                break
        else:
            for one in optional:
                if one is not None and type(one) is not kind:
                    break
            else:
                return floor
    return _floor_for(array, others, optional)


#: The backend by type of array, outside any ``with`` block.
_FLOORS: dict[type, ModuleType] = {}


def _floor_for(array: Array, others: tuple[object, ...], optional: tuple[object, ...]) -> ModuleType:
    kinds = {array_kind(one) for one in (array, *others)} | {array_kind(one) for one in optional if one is not None}
    if len(kinds) > 1:
        raise TypeError(
            "NumPy and CuPy arrays were mixed: move them to one place first (cupy.asarray(x), cupy.asnumpy(x))"
        )
    kind = kinds.pop()
    choice = _forced.get()
    name = ("cuda" if kind == "cupy" else "reference") if choice is None else choice.name
    if (name == "cuda") != (kind == "cupy"):
        needed = "CuPy" if name == "cuda" else "NumPy"
        given = "CuPy" if kind == "cupy" else "NumPy"
        advice = "cupy.asarray(x)" if name == "cuda" else "cupy.asnumpy(x)"
        raise TypeError(f"the {name} backend takes {needed} arrays, got {given} arrays: use {advice}")
    floor = importlib.import_module("gpu_layers.reference" if name == "reference" else "gpu_layers.kernels")
    if choice is None:
        _FLOORS[type(array)] = floor
    return floor


def array_kind(array: object) -> str:
    """Its library's name, numpy or cupy; TypeError for what is no array of either."""
    if type(array) is np.ndarray:
        return "numpy"
    if is_cupy_array(array):
        return "cupy"
    kind = type(array)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    # Subclasses give operators other meanings (masked arrays, matrices): never guess.
    if isinstance(array, np.ma.MaskedArray):
        advice = ", and numpy.asarray(x) would drop its mask: say what masked elements are, by x.filled(value)"
    else:
        advice = ": pass numpy.asarray(x)" if isinstance(array, np.ndarray) else ""
    raise TypeError(f"expected a numpy.ndarray or cupy.ndarray, got {name}{advice}")
