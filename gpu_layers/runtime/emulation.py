"""Running kernels on NumPy arrays: the emulated module of a kernel, and how it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from gpu_layers.emulator import EmulatedModule, Schedule, Trace, load
from gpu_layers.emulator.defaults import cuda_headers
from gpu_layers.emulator.toolchain import find_compiler
from gpu_layers.runtime.kernel import Kernel, all_kernels
from gpu_layers.runtime.sources import source_folder


@dataclass(frozen=True)
class Emulation:
    """How kernels run on the CPU; the options of ``use_backend("emulated")``.

    Attributes
    ----------
    check : bool
        Check and count every memory access, and find data races; some ten times slower.
    schedule : Schedule
        Order in which threads and blocks run.
    sanitizer : {"asan", "ubsan"}, optional
        Run under a sanitizer, in a process that was started for it; see ``sanitizer_environment``.
    record : callable, optional
        Called after each checked launch with the kernel and its ``Trace``.
    """

    check: bool = False
    schedule: Schedule = field(default_factory=Schedule)
    sanitizer: str | None = None
    record: Callable[[Kernel, Trace], None] | None = None

    def __post_init__(self) -> None:
        if self.sanitizer not in (None, "asan", "ubsan"):
            raise ValueError(f"sanitizer must be 'asan' or 'ubsan', got {self.sanitizer!r}")
        if self.sanitizer and self.check:
            raise ValueError("check and sanitizer exclude each other: both instrument every memory access")
        if self.record is not None and not self.check:
            raise ValueError("record needs check=True: only checked launches are counted")
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a Schedule, got {type(self.schedule).__name__}")
        # What is missing is told here, not by a first launch, for which a random number may have been drawn.
        find_compiler(), cuda_headers()

    @property
    def mode(self) -> str:
        """The emulator's build for these options."""
        return self.sanitizer or ("trace" if self.check else "fast")

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        values: list[object],
        shared_bytes: int,
        cooperative: bool,
    ) -> None:
        """Run a kernel on ``values``, which ``gpu_layers.runtime.launch`` has checked."""
        trace = emulated_module(kernel, self.mode).launch(
            kernel.name,
            grid,
            block,
            values,
            shared_bytes=shared_bytes,
            cooperative=cooperative,
            schedule=self.schedule,
            argument_names=tuple(parameter.name for parameter in kernel.parameters),
            initialised=kernel.initialised,
        )
        if self.record is not None and trace is not None:
            self.record(kernel, trace)


@cache
def emulated_module(kernel: Kernel, mode: str) -> EmulatedModule:
    """The compiled module of a kernel: one compilation serves all kernels of a file and an element type."""
    names = [other.name for other in all_kernels() if _group(other) == _group(kernel)]
    return load(source_folder() / kernel.source, names, mode=mode)


def _group(kernel: Kernel) -> tuple[str, str]:
    return kernel.source, kernel.name.split("<", 1)[1].split(",")[0].rstrip(">")
