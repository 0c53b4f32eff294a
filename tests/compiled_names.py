"""Which kernels of a file the tests compile for which architecture."""

from gpu_layers.runtime.kernel import all_kernels

#: Those whose machine code the gates read, and that for which every element type is compiled: float64 takes a quarter
#: of the compiler's time, and what one architecture shows of it, the others do.
GATED, WHOLE = (80, 90, 100), 90


def names_of(source, capability):
    """The kernels of a file for one of these architectures."""
    return tuple(
        kernel.name
        for kernel in all_kernels()
        if kernel.source == source and (capability == WHOLE or "double" not in _arguments(kernel.name))
    )


def each_architecture(names, rows):
    """Parameters of a test and, last, ``capability``; a row whose first value names float64 for one alone."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    values = [
        (*row, capability)
        for capability in GATED
        for row in rows
        if capability == WHOLE or "double" not in _arguments(row[0])
    ]
    return (*names, "capability"), values


def _arguments(name):
    """Those of a template, or, of no template, all of it."""
    return name.partition("<")[2] or name
