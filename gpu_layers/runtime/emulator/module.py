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
from .source_lines import replace_places

#: The runtime of a module has one running launch, and signal handlers are the process's.
_launch_lock = threading.Lock()


class EmulatedModule:
    """Kernels of one ``.cu`` file, compiled for the CPU. Made by :func:`load`."""

    def __init__(self, source: pathlib.Path, names: Sequence[str], mode: str, library: pathlib.Path):
        self.source = source
        self.names = tuple(names)
        self.mode = mode
        self._library = ctypes.CDLL(str(library))
        self._find = self._library.gpu_layers_find_kernel
        self._find.restype = ctypes.POINTER(abi.KernelRecord)
        self._launch = self._library.gpu_layers_launch
        self._launch.restype = None
        self._parameters = {name: self._read_parameters(i) for i, name in enumerate(self.names)}

    def __repr__(self) -> str:
        return f"EmulatedModule({str(self.source)!r}, {len(self.names)} kernels, mode={self.mode!r})"

    def _read_parameters(self, index: int) -> tuple[ParameterType, ...]:
        record = self._find(index).contents
        return tuple(ParameterType.from_record(record.parameters[i]) for i in range(record.parameter_count))

    def parameters(self, name: str) -> tuple[ParameterType, ...]:
        """What the compiled function ``name`` takes, from its C++ type."""
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
        schedule: Schedule = Schedule(),  # noqa: B008 - frozen
        max_shared_bytes: int = geometry.MAX_SHARED_BYTES,
        max_cooperative_blocks: int = geometry.MAX_COOPERATIVE_BLOCKS,
        argument_names: Sequence[str] | None = None,
    ) -> None:
        parameters = self.parameters(name)
        labels = _labels(len(parameters), argument_names)
        check_values(name, parameters, values, labels)
        full_grid, full_block = geometry.check_launch(
            grid,
            block,
            shared_bytes,
            cooperative=cooperative,
            max_shared_bytes=max_shared_bytes,
            max_cooperative_blocks=max_cooperative_blocks,
        )
        packed = (ctypes.c_void_p * (len(values) + 1))()
        keep = []
        for i, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
            if parameter.is_pointer:
                pointer = ctypes.c_void_p(None if value is None else value.ctypes.data)
                keep.append(pointer)
                packed[i] = ctypes.addressof(pointer)
            else:
                copy = np.array(value, copy=True)
                keep.append(copy)
                packed[i] = copy.ctypes.data
        request = abi.LaunchRequest(
            kernel=self.names.index(name),
            schedule=schedule.code,
            shuffle_blocks=schedule.shuffle_blocks,
            cooperative=cooperative,
            seed=schedule.seed & (2**64 - 1),
            grid=full_grid,
            block=full_block,
            shared_bytes=shared_bytes,
            values=ctypes.cast(packed, ctypes.POINTER(ctypes.c_void_p)),
        )
        result = abi.LaunchResult()
        with _launch_lock:
            self._launch(ctypes.byref(request), ctypes.byref(result))
            if result.status != 0:
                message = result.message.decode(errors="replace")
                raise errors.BY_KIND[result.status](f"{name}: {replace_places(message)}")


def _labels(count: int, argument_names: Sequence[str] | None) -> list[str]:
    if argument_names is None:
        return [f"argument {i}" for i in range(count)]
    if len(argument_names) != count:
        raise TypeError(f"the kernel takes {count} arguments, but got {len(argument_names)} argument names")
    return [f"argument {i} '{name}'" for i, name in enumerate(argument_names)]
