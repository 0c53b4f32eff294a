"""Which launches an operation makes: the launchers run, the kernels do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpu_layers.runtime.backend import use_executor
from gpu_layers.runtime.kernel import Kernel


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes
    ----------
    kernel : Kernel
    grid, block : tuple of three int
    shared_bytes : int
        Dynamic shared memory a block.
    cooperative : bool
    array_bytes : dict of str to int
        Size of each array that it is given, by parameter.
    values : list
        What it is given: arrays, None for a null pointer, numbers.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    cooperative: bool
    array_bytes: dict[str, int]
    values: list[Any] = field(default_factory=list, repr=False)


class NoLaunches:
    """Takes launches, and does nothing: what remains is the host's work."""

    def launch(self, *launch: Any) -> None:
        """Nothing."""


class _Listed:
    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: list[Any],
        shared_bytes: int,
        cooperative: bool,
    ) -> None:
        sizes = {
            parameter.name: value.nbytes
            for parameter, value in zip(kernel.parameters, values, strict=True)
            if parameter.is_pointer and value is not None
        }
        self.launches.append(Launch(kernel, grid, block, shared_bytes, cooperative, sizes, list(values)))


@contextmanager
def listed_launches() -> Iterator[list[Launch]]:
    """A list that grows with each launch of NumPy arrays in a ``with`` block. Results hold whatever was in memory."""
    executor = _Listed()
    with use_executor(executor):
        yield executor.launches
