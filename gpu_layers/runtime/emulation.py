"""Running kernels on NumPy arrays: which emulated module a kernel is in, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gpu_layers.runtime.emulator import EmulatedModule, Schedule, load
from gpu_layers.runtime.kernel import Kernel, all_kernels
from gpu_layers.runtime.sources import source_folder


@dataclass(frozen=True)
class Emulation:
    """How kernels run on the CPU; the options of ``use_backend("emulated")``.

    Attributes
    ----------
    check : bool
        Check and count every memory access, and find data races: some ten times slower.
    schedule : Schedule
        Order in which threads and blocks run.
    """

    check: bool = False
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def mode(self) -> str:
        """Build of the emulator that this needs."""
        return "trace" if self.check else "fast"

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: list[Any],
        shared_bytes: int,
        cooperative: bool,
    ) -> None:
        """Run a kernel; ``values`` are bound and checked (see ``gpu_layers.runtime.launch``)."""
        emulated_module(kernel, self.mode).launch(
            kernel.name,
            grid,
            block,
            values,
            shared_bytes=shared_bytes,
            cooperative=cooperative,
            schedule=self.schedule,
            argument_names=tuple(parameter.name for parameter in kernel.parameters),
        )


def emulated_module(kernel: Kernel, mode: str) -> EmulatedModule:
    """The compiled kernel, with its kin: one compilation serves all kernels of a file and an element type."""
    names = [other.name for other in all_kernels() if _group(other) == _group(kernel)]
    return load(source_folder() / kernel.source, names, mode=mode)


def _group(kernel: Kernel) -> tuple[str, str]:
    return kernel.source, kernel.name.split("<", 1)[1].split(",")[0].rstrip(">")
