"""Which kernels of a file the tests compile for which architecture."""

import fcntl

from gpu_layers.core.cache import writable_cache_folder
from gpu_layers.runtime.kernel import all_kernels
from gpu_layers.runtime.nvrtc import Architecture, compiled_module

#: Those whose machine code the gates read, and that for which every element type is compiled. On the others float32
#: and bfloat16 stand for all: the rest takes half of the compiler's time, and what one architecture shows of it, the
#: others do.
GATED, WHOLE = (80, 90, 100), 90
_ONE_ALONE = ("double", "__half")


def names_of(source, capability):
    """The kernels of a file for one of these architectures."""
    return tuple(
        kernel.name for kernel in all_kernels() if kernel.source == source and _is_compiled(kernel.name, capability)
    )


def compiled(source, names, capability):
    """The compiled module of some kernels of a file. While a process compiles it others wait, and then read it."""
    with (writable_cache_folder("locks") / f"{source}-{capability}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return compiled_module(source, names, Architecture(capability), warnings_as_errors=True)


def each_architecture(names, rows):
    """Parameters of a test and, last, ``capability``; a row whose first value is a kernel only where it is compiled."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    values = [(*row, capability) for capability in GATED for row in rows if _is_compiled(row[0], capability)]
    return (*names, "capability"), values


def _is_compiled(name, capability):
    # Of the arguments of a template, or, of no template, of all of it.
    arguments = name.partition("<")[2] or name
    return capability == WHOLE or not any(element in arguments for element in _ONE_ALONE)
