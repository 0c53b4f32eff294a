"""A stand-in for CuPy whose GPUs are emulated: memory with addresses, and a driver that runs what it is told to.

Programs run on its arrays by the very steps that they take on a GPU. What is wrong there shows: an address that belongs
to nobody, or to another GPU; memory that was not set to zero; a launch of another function.
"""

import contextlib
import ctypes
import math
import weakref
from types import SimpleNamespace

import numpy as np

from gpu_layers.runtime.emulation import emulated_module
from gpu_layers.runtime.kernel import all_kernels
from tests.runtime.fake_cupy import CUDADriverError, device_class, driver

KERNELS = {kernel.name: kernel for kernel in all_kernels()}
_ALIGNMENT = 512  # as CuPy's memory


class Memory:
    """Some bytes of a GPU. They are there for as long as somebody holds this; at first they are NaN in every dtype."""

    def __init__(self, cupy, size):
        self.device_id, self.size = cupy.current, size
        self._bytes = np.full(size + _ALIGNMENT, 0xFF, np.uint8)
        first = -self._bytes.ctypes.data % _ALIGNMENT
        self.bytes = self._bytes[first : first + size]
        self.ptr = self._bytes.ctypes.data + first
        cupy.memories[self.ptr] = self

    def __add__(self, offset):
        return Pointer(self, self.ptr + offset)


class Pointer:
    """A place in memory."""

    def __init__(self, memory, ptr):
        self.memory, self.ptr, self.device_id = memory, ptr, memory.device_id

    def __add__(self, offset):
        return Pointer(self.memory, self.ptr + offset)

    def copy_from_device_async(self, source, size):
        """CuPy's: on the current stream of the current device."""
        assert self.device_id == source.device_id
        here, there = self.ptr - self.memory.ptr, source.ptr - source.memory.ptr
        self.memory.bytes[here : here + size] = source.memory.bytes[there : there + size]


class Array:
    """What programs use of a CuPy array. Its elements are copied whole, so they must lie at their boundaries."""

    def __init__(self, cupy, shape, dtype, data=None, strides=None):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        data = cupy.cuda.alloc(math.prod(self.shape) * self.dtype.itemsize) if data is None else data
        memory = getattr(data, "memory", data)
        self.data = Pointer(memory, data.ptr)
        place = data.ptr - memory.ptr
        self._cupy, self.values = cupy, np.ndarray(self.shape, self.dtype, memory.bytes, place, strides)
        self.strides, self.flags, self.nbytes = self.values.strides, self.values.flags, self.values.nbytes

    def __setitem__(self, place, source):
        assert place is ...
        for one in (self, source):
            assert one.data.device_id == self._cupy.current, "CuPy works on arrays of the current device"
            addresses = (one.data.ptr, *one.strides)
            assert not any(number % one.dtype.itemsize for number in addresses), "whole elements at their boundaries"
        self.values[...] = source.values

    def view(self, change):
        """The same memory: what a NumPy array becomes by ``change``, e.g. a slice."""
        base = np.ndarray(self.shape, self.dtype, self.values, 0, self.strides)
        changed = change(base)
        ptr = self.data.ptr + changed.ctypes.data - base.ctypes.data
        data = Pointer(self.data.memory, ptr)
        return Array(self._cupy, changed.shape, changed.dtype, data, changed.strides)


class EmulatedCupy:
    """One process with two GPUs, that hold ``resident`` blocks of any kernel at once.

    Attributes
    ----------
    current : int
        Number of the current GPU.
    launched : list of (str, int)
        Each kernel's name, and the GPU that ran it.
    refuses : bool
        Whether the driver refuses launches of blocks that wait for each other.
    """

    def __init__(self, resident=264):
        self.current, self.launched, self.refuses, self._streams = 0, [], False, [7]
        self.memories = weakref.WeakValueDictionary()
        cupy, functions = self, []

        class RawModule:
            def __init__(self, *, path, enable_cooperative_groups):
                self.device = cupy.current

            def get_function(self, symbol):
                functions.append((KERNELS[symbol], self.device))
                return SimpleNamespace(shared_size_bytes=0, kernel=SimpleNamespace(ptr=len(functions) - 1))

        def launched(function, grid, block, shared_bytes, stream, addresses, cooperative):
            kernel, device = functions[function]
            assert device == cupy.current, "a function is launched in the context that it was loaded in"
            assert stream == cupy._streams[-1], "the current stream"
            cupy._launch(kernel, grid, block, addresses(len(kernel.parameters)), shared_bytes, cooperative)

        self.RawModule = RawModule
        self.cuda = SimpleNamespace(
            Device=device_class(self, "90", resident),
            alloc=lambda size: Memory(cupy, size),
            device=SimpleNamespace(get_device_id=lambda: cupy.current),
            driver=driver(launched, occupancyMaxActiveBlocksPerMultiprocessor=lambda *_: 1),
            runtime=SimpleNamespace(memsetAsync=self._memset),
            get_current_stream=lambda: SimpleNamespace(ptr=cupy._streams[-1]),
        )

    def ndarray(self, shape, dtype, data=None, strides=None):
        return Array(self, shape, dtype, data, strides)

    def asarray(self, values):
        """The values in memory of the current GPU."""
        array = self.ndarray(values.shape, values.dtype)
        array.values[...] = values
        return array

    def ones(self, shape, dtype):
        return self.asarray(np.ones(shape, dtype))

    def concatenate(self, arrays, axis):
        return self.asarray(np.concatenate([array.values for array in arrays], axis))

    def ascontiguousarray(self, array):
        return self.asarray(np.ascontiguousarray(array.values))

    @contextlib.contextmanager
    def stream(self, ptr):
        """Make this the current stream."""
        self._streams.append(ptr)
        yield
        self._streams.pop()

    def _bytes_at(self, ptr):
        for memory in list(self.memories.values()):
            if memory.ptr <= ptr < memory.ptr + memory.size:
                assert memory.device_id == self.current, "memory of another GPU"
                return memory.bytes[ptr - memory.ptr :]
        raise AssertionError(f"{ptr:#x} is nobody's memory")

    def _memset(self, ptr, value, size, stream):
        assert stream == self._streams[-1], "another stream than that of the launches"
        self._bytes_at(ptr)[:size] = value

    def _launch(self, kernel, grid, block, addresses, shared_bytes, cooperative):
        if cooperative and self.refuses:
            raise CUDADriverError("CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE: too many blocks")
        values = []
        for parameter, argument in zip(kernel.parameters, addresses, strict=True):
            if parameter.is_pointer:
                ptr = ctypes.c_uint64.from_address(argument).value
                found, size = self._bytes_at(ptr) if ptr else None, parameter.dtype.itemsize
                assert ptr % size == 0, f"{kernel.name}: {parameter.name} is misaligned, which ends a GPU's context"
                values.append(None if found is None else found[: found.size // size * size].view(parameter.dtype))
            else:
                content = ctypes.string_at(argument, parameter.dtype.itemsize)
                values.append(np.frombuffer(content, parameter.dtype))
        self.launched.append((kernel.name, self.current))
        emulated_module(kernel, "fast").launch(
            kernel.name, grid, block, values, shared_bytes=shared_bytes, cooperative=cooperative
        )
