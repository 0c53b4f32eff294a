"""A compiled ``.cu`` file, and launches of its kernels."""

from __future__ import annotations

import ctypes
import pathlib
import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from . import abi, errors, geometry
from .parameters import ParameterType, check_values
from .schedule import Schedule
from .source_lines import DebugInformation, resolve
from .staging import StagedArguments
from .trace import SHARED, Footprint, LineTraffic, Trace, Traffic, merge

#: A module runs one launch at a time, and so does the process: signal handlers are the process's.
_launch_lock = threading.Lock()

_ACCESSES = ("load", "store", "atomic")  # in the order of the runtime's enum
_FREE_RUNNING = Schedule()


class EmulatedModule:
    """Kernels of one ``.cu`` file, compiled for the CPU. Made by :func:`load`.

    Parameters
    ----------
    source : pathlib.Path
    names : sequence of str
        C++ name expressions of the kernels, as they were compiled.
    mode : str
    library : pathlib.Path
        The compiled module.
    hidden_folders : sequence of pathlib.Path
        Folders whose lines messages leave out.
    """

    def __init__(
        self,
        source: pathlib.Path,
        names: Sequence[str],
        mode: str,
        library: pathlib.Path,
        hidden_folders: Sequence[pathlib.Path] = (),
    ):
        self.source = source
        self.names = tuple(names)
        self.mode = mode
        self._library = ctypes.CDLL(str(library))
        self._find = self._library.gpu_layers_find_kernel
        self._find.restype = ctypes.POINTER(abi.KernelRecord)
        self._library.gpu_layers_launch.restype = None
        self._library.gpu_layers_load_address.restype = ctypes.c_uint64
        self._allocate = self._library.gpu_layers_allocate_argument
        self._allocate.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self._allocate.restype = ctypes.c_void_p
        self._free = self._library.gpu_layers_free_argument
        self._free.argtypes = [ctypes.c_void_p]
        self._free.restype = None
        self._debug = DebugInformation(library, self._library.gpu_layers_load_address(), hidden_folders)
        self._parameters = {name: self._read_parameters(i) for i, name in enumerate(self.names)}

    def __repr__(self) -> str:
        return f"EmulatedModule({str(self.source)!r}, {len(self.names)} kernels, mode={self.mode!r})"

    def _read_parameters(self, index: int) -> tuple[ParameterType, ...]:
        record = self._find(index).contents
        return tuple(ParameterType.from_record(record.parameters[i]) for i in range(record.parameter_count))

    def parameters(self, name: str) -> tuple[ParameterType, ...]:
        """The parameters of the compiled function ``name``, from its C++ type.

        Raises
        ------
        ValueError
            If the module was not built with it.
        """
        try:
            return self._parameters[name]
        except KeyError:
            raise ValueError(f"{self.source.name} was not built with {name}; it has {', '.join(self.names)}") from None

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        values: Sequence[Any],
        *,
        shared_bytes: int = 0,
        cooperative: bool = False,
        schedule: Schedule = _FREE_RUNNING,
        initialised: Collection[int | str] = (),
        argument_names: Sequence[str] | None = None,
        max_shared_bytes: int = geometry.MAX_SHARED_BYTES,
        max_cooperative_blocks: int = geometry.MAX_COOPERATIVE_BLOCKS,
    ) -> Trace | None:
        """Run a kernel to its end.

        Parameters
        ----------
        name : str
            One of the names the module was built with.
        grid, block : sequence of int
            1 to 3 sizes each.
        values : sequence
            One per parameter: a ``numpy.ndarray`` (its first element's address is passed) or None for a
            pointer; a NumPy scalar or an array of size 1 for a value or struct.
        shared_bytes : int, optional
            Dynamic shared memory of a block.
        cooperative : bool, optional
            All blocks are resident at once and may use ``grid.sync()``.
        schedule : Schedule, optional
        initialised : collection of int or str, optional
            Checked mode: the arrays, other than const ones, with values that the kernel may read before it writes
            them, by position or name. An array that shares memory with a const argument is one of them.
        argument_names : sequence of str, optional
            Names of the arguments in messages and counters.
        max_shared_bytes, max_cooperative_blocks : int, optional
            Limits of the device to imitate.

        Returns
        -------
        Trace or None
            The counters, in checked mode.

        Raises
        ------
        TypeError, ValueError
            For arguments that the kernel or a driver does not take; nothing has run then.
        EmulationError
            For errors of the kernel. Checked and sanitizer modes then leave the arrays as they were.
        """
        parameters = self.parameters(name)
        names = _argument_names(len(parameters), argument_names)
        labels = [f"argument {i} '{n}'" if argument_names is not None else n for i, n in enumerate(names)]
        check_values(name, parameters, values, labels)
        known = _initialised_positions(parameters, names, initialised)
        full_grid, full_block = geometry.check_launch(
            grid,
            block,
            shared_bytes,
            cooperative=cooperative,
            max_shared_bytes=max_shared_bytes,
            max_cooperative_blocks=max_cooperative_blocks,
        )
        request = abi.LaunchRequest(
            kernel=self.names.index(name),
            schedule=schedule.code,
            shuffle_blocks=schedule.shuffle_blocks,
            cooperative=cooperative,
            seed=schedule.seed & (2**64 - 1),
            grid=full_grid,
            block=full_block,
            shared_bytes=shared_bytes,
        )
        with _launch_lock:
            if self.mode == "fast":
                addresses = {i: v.ctypes.data for i, v in enumerate(values) if isinstance(v, np.ndarray)}
                self._run(request, parameters, values, addresses, labels)
                return None
            staged = StagedArguments(parameters, values, known, self._allocate, self._free)
            try:
                self._describe_memory(request, staged)
                result = self._run(request, parameters, values, staged.addresses, labels)
                staged.copy_back()
                if self.mode != "trace":
                    return None
                trace = self._trace(name, result, names)
            finally:
                staged.release()
        if trace.shared_bytes > geometry.DEFAULT_SHARED_BYTES:
            raise ValueError(
                f"{name} uses {trace.shared_bytes} bytes of static shared memory: "
                f"a kernel has at most {geometry.DEFAULT_SHARED_BYTES}"
            )
        return trace

    def _describe_memory(self, request: abi.LaunchRequest, staged: StagedArguments) -> None:
        request.arguments = ctypes.cast(staged.records, ctypes.POINTER(abi.ArgumentRecord))
        request.argument_count = staged.count
        if self.mode == "trace":
            arrays = self._debug.shared_arrays()
            records = (abi.SharedVariableRecord * max(1, len(arrays)))(
                *(abi.SharedVariableRecord(array.offset, array.size, i) for i, array in enumerate(arrays))
            )
            request.shared_variables = ctypes.cast(records, ctypes.POINTER(abi.SharedVariableRecord))
            request.shared_variable_count = len(arrays)

    def _run(
        self,
        request: abi.LaunchRequest,
        parameters: Sequence[ParameterType],
        values: Sequence[object],
        addresses: dict[int, int],
        labels: Sequence[str],
    ) -> abi.LaunchResult:
        packed = (ctypes.c_void_p * (len(values) + 1))()
        pointers = (ctypes.c_void_p * (len(values) + 1))()
        by_value = []
        for i, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
            if parameter.is_pointer:
                pointers[i] = addresses.get(i)
                packed[i] = ctypes.addressof(pointers) + i * ctypes.sizeof(ctypes.c_void_p)
            else:
                by_value.append(np.array(value, copy=True))
                packed[i] = by_value[-1].ctypes.data
        request.values = ctypes.cast(packed, ctypes.POINTER(ctypes.c_void_p))
        result = abi.LaunchResult()
        self._library.gpu_layers_launch(ctypes.byref(request), ctypes.byref(result))
        if result.status != 0:
            message = resolve(result.message.decode(errors="replace"), self._debug, lambda i: labels[i])
            raise errors.BY_KIND[result.status](f"{self.names[request.kernel]}: {message}")
        return result

    def _trace(self, name: str, result: abi.LaunchResult, names: Sequence[str]) -> Trace:
        records = [result.traffic[i] for i in range(result.traffic_count)]
        places = self._debug.lines(record.program_counter for record in records)
        lines = merge(
            LineTraffic(
                places[record.program_counter],
                SHARED if record.parameter < 0 else names[record.parameter],
                _ACCESSES[record.access],
                record.width,
                Traffic(
                    record.accesses,
                    record.bytes,
                    record.requests,
                    record.sectors,
                    record.lines,
                    record.wavefronts,
                    record.wavefronts - record.ideal_wavefronts,
                ),
            )
            for record in records
        )
        footprints = {}
        for i in range(result.footprint_count):
            print_ = result.footprints[i]
            footprints[names[print_.parameter]] = Footprint(
                print_.bytes_loaded, print_.bytes_stored, print_.sectors_loaded, print_.sectors_stored
            )
        return Trace((name,), lines, footprints, result.shared_bytes_touched)


def _argument_names(count: int, given: Sequence[str] | None) -> list[str]:
    if given is None:
        return [f"argument {i}" for i in range(count)]
    if len(given) != count:
        raise TypeError(f"the kernel takes {count} arguments, got {len(given)} argument names")
    return list(given)


def _initialised_positions(
    parameters: Sequence[ParameterType], names: Sequence[str], given: Collection[int | str]
) -> set[int]:
    positions = {i for i, parameter in enumerate(parameters) if parameter.is_pointer and parameter.is_const}
    for item in given:
        if isinstance(item, str) and item not in names:
            raise ValueError(f"initialised must be among {', '.join(names)}, got {item!r}")
        position = names.index(item) if isinstance(item, str) else int(item)
        if not (0 <= position < len(parameters) and parameters[position].is_pointer):
            raise ValueError(f"initialised must name array arguments, got {item!r}")
        positions.add(position)
    return positions
