"""Errors of emulated kernels, as Python exceptions."""

from __future__ import annotations


class EmulationError(RuntimeError):
    """A kernel did something undefined, or could not be built or run on the CPU."""


class ToolchainError(EmulationError):
    """No C++ compiler, or no CUDA headers, on this machine."""


class CacheError(EmulationError):
    """Compiled modules cannot be kept in the folder for them."""


class CompilationError(EmulationError):
    """The host compiler refused a ``.cu`` file."""


class BarrierError(EmulationError):
    """Threads of one block disagree about a barrier."""


class WarpError(EmulationError):
    """A warp operation with a wrong mask, or lanes of one mask in different operations."""


class DeadlockError(EmulationError):
    """No thread of a block can continue."""


class CrashError(EmulationError):
    """The kernel accessed unmapped memory, overflowed its stack or divided an integer by zero."""


class TrapError(EmulationError):
    """The kernel called ``__trap()``."""


class OutOfBoundsError(EmulationError):
    """An access outside every array that the kernel was given."""


class MisalignedError(EmulationError):
    """A vector access at an address that is not a multiple of its size."""


class ReadOnlyError(EmulationError):
    """A store through a pointer to const."""


class UninitialisedError(EmulationError):
    """A load of memory that was never written."""


class RaceError(EmulationError):
    """Two threads access the same memory, one of them writes, and nothing orders them."""


class EmulatorLimitError(EmulationError):
    """The launch is too large for the bookkeeping of checked mode."""


#: In the order of ``ErrorKind`` in ``host/launch_abi.h``.
BY_KIND: tuple[type[EmulationError], ...] = (
    EmulationError,
    BarrierError,
    WarpError,
    DeadlockError,
    CrashError,
    TrapError,
    OutOfBoundsError,
    MisalignedError,
    ReadOnlyError,
    UninitialisedError,
    RaceError,
    EmulatorLimitError,
)
