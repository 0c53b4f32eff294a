"""Running programs on a GPU: loading compiled kernels, binding launches to them, starting them."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from threading import Lock
from types import ModuleType
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import graph_device, import_cupy
from gpu_layers.runtime.copying import copy_into
from gpu_layers.runtime.kernel import Kernel
from gpu_layers.runtime.nvrtc import Architecture, architecture_for, compiled_module
from gpu_layers.runtime.steps import (
    Allocate,
    BoundStep,
    Compute,
    CooperativeLaunchRefusedError,
    Deliver,
    Launch,
    Slot,
    Views,
)

# Shared memory that a launch may use unless a function opts in to more.
_SHARED_BY_DEFAULT = 48 * 1024
# Percent of the memory of L1 cache and shared memory that goes to shared memory.
_CARVE_OUT = 100
_POINTER = 8
# Errors of the driver: too many blocks to be resident at once, or no cooperative launches here.
_REFUSALS = (
    "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE",
    "CUDA_ERROR_NOT_SUPPORTED",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
)

# The driver's error where no context is current.
_NO_CONTEXT = "CUDA_ERROR_INVALID_CONTEXT"

# Errors of a driver that does not know all instructions of a kernel.
_UNKNOWN = ("CUDA_ERROR_INVALID_PTX", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "CUDA_ERROR_NO_BINARY_FOR_GPU")

_OLDEST = Architecture(75, ptx=True)

_refused: set[tuple[Kernel, int]] = set()


@cache
def _architecture(device: int) -> Architecture:
    return architecture_for(int(import_cupy().cuda.Device(device).compute_capability))


@cache
def _raw_kernel(kernel: Kernel, device: int, cooperative: bool) -> Any:
    """The loaded kernel. The caller has made ``device`` current: the module is loaded in its context.

    A driver that does not know all of its instructions gets it as PTX of the oldest architecture.
    """
    try:
        return _loaded(kernel, _architecture(device), cooperative)
    except import_cupy().cuda.driver.CUDADriverError as error:
        if not str(error).startswith(_UNKNOWN):
            raise
        return _loaded(kernel, _OLDEST, cooperative)


def _loaded(kernel: Kernel, architecture: Architecture, cooperative: bool) -> Any:
    cupy = import_cupy()
    module = compiled_module(kernel.source, (kernel.name,), architecture)
    raw_module = cupy.RawModule(path=str(module.path), enable_cooperative_groups=cooperative)
    raw_kernel = raw_module.get_function(module.symbols[kernel.name])
    _ = raw_kernel.shared_size_bytes  # which loads it
    return raw_kernel


@cache
def _function(kernel: Kernel, device: int, cooperative: bool, shared_bytes: int) -> Any:
    """The function for launches with this much shared memory; the caller has made ``device`` current."""
    raw_kernel = _raw_kernel(kernel, device, cooperative)
    # The limit is for static and dynamic shared memory together. It belongs to the loaded function, for every amount of
    # dynamic shared memory, so it only grows.
    beyond_default = raw_kernel.shared_size_bytes + shared_bytes > _SHARED_BY_DEFAULT
    if beyond_default and shared_bytes > _opted_in.get((kernel, device, cooperative), 0):
        raw_kernel.max_dynamic_shared_size_bytes = shared_bytes
        raw_kernel.preferred_shared_memory_carveout = _CARVE_OUT
        _opted_in[kernel, device, cooperative] = shared_bytes
    return raw_kernel.kernel


_opted_in: dict[tuple[Kernel, int, bool], int] = {}


@cache
def resident_blocks_of_gpu(kernel: Kernel, threads: int, shared_bytes: int, device: int, cooperative: bool) -> int:
    """Number of blocks that ``device`` holds at once; 0 if its shared memory is too small for one.

    It asks the function that a launch with this ``cooperative`` uses: the other would be loaded for this alone. Of a
    kernel that the driver cannot load there are none.
    """
    cupy = import_cupy()
    current = cupy.cuda.Device(device)
    with current:
        try:
            static = _raw_kernel(kernel, device, cooperative).shared_size_bytes
        except cupy.cuda.driver.CUDADriverError as error:
            if str(error).startswith(_UNKNOWN):
                return 0
            raise
        if static + shared_bytes > current.attributes["MaxSharedMemoryPerBlockOptin"]:
            return 0
        function = _function(kernel, device, cooperative, shared_bytes)
        per_multiprocessor = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            function.ptr, threads, shared_bytes
        )
        return per_multiprocessor * current.attributes["MultiProcessorCount"]


def is_refused(kernel: Kernel, device: int) -> bool:
    """Whether the driver has refused to launch this kernel with blocks that wait for each other."""
    return (kernel, device) in _refused


def bound_launch(step: Launch, device: int) -> BoundStep:
    """A function that starts a launch, with pointers and numbers in their slots.

    All arguments are in one buffer, and after them their addresses, which the driver takes. Constant ones are written
    once, the others in each call by one ``pack``. The driver's own function starts the kernel: CuPy's launch reads each
    argument again, and makes a cooperative grid smaller that does not fit, whose blocks would then wait for ever.
    """
    cuda = import_cupy().cuda
    function = _function(step.kernel, device, step.cooperative, step.shared_bytes)
    varying = [argument.index for argument in step.arguments if isinstance(argument, Slot)]
    constants = [
        bytes(_POINTER) if argument is None else argument.tobytes()
        for argument in step.arguments
        if not isinstance(argument, Slot)
    ]
    # Every constant at a multiple of 16 bytes, which suffices for every type.
    size = _aligned(_POINTER * len(varying)) + sum(_aligned(len(constant)) for constant in constants)
    buffer = (ctypes.c_uint64 * (size // _POINTER + len(step.arguments)))()
    base, next_varying, next_constant = ctypes.addressof(buffer), 0, _aligned(_POINTER * len(varying))
    addresses, remaining = [], iter(constants)
    for argument in step.arguments:
        if isinstance(argument, Slot):
            addresses.append(base + next_varying)
            next_varying += _POINTER
        else:
            constant = next(remaining)
            ctypes.memmove(base + next_constant, constant, len(constant))
            addresses.append(base + next_constant)
            next_constant += _aligned(len(constant))
    parameters = base + size
    struct.pack_into(f"{len(addresses)}Q", buffer, size, *addresses)
    pack, pick = struct.Struct(f"{len(varying)}Q").pack_into, _picker(varying)
    geometry = function.ptr, *step.grid, *step.block, step.shared_bytes
    # No further ones in the last argument, which a cooperative launch lacks.
    rest = (parameters,) if step.cooperative else (parameters, 0)
    driver, current_stream = cuda.driver, cuda.get_current_stream
    launch = driver.launchCooperativeKernel if step.cooperative else driver.launchKernel
    driver_error, context = driver.CUDADriverError, driver.ctxGetCurrent()
    # The lock guards the buffer: the driver copies the arguments before the launch returns, and other threads may run.
    lock = Lock()

    def start(objects: Any, slots: list[int], stream: Any) -> None:
        with lock:
            pack(buffer, 0, *pick(slots))
            handle = (current_stream() if stream is None else stream).ptr
            try:
                launch(*geometry, handle, *rest)
            except driver_error as error:
                if not str(error).startswith(_NO_CONTEXT):
                    raise
                # The first call of CUDA in this thread: only the runtime's functions would have made it current. It
                # is the one in which the function was loaded.
                driver.ctxSetCurrent(context)
                launch(*geometry, handle, *rest)

    return _refusable(start, step.kernel, device) if step.cooperative else start


def _refusable(start: BoundStep, kernel: Kernel, device: int) -> BoundStep:
    driver_error = import_cupy().cuda.driver.CUDADriverError

    def start_or_say(objects: Any, slots: list[int], stream: Any) -> None:
        try:
            start(objects, slots, stream)
        except driver_error as error:
            if not str(error).startswith(_REFUSALS):
                raise
            _refused.add((kernel, device))
            raise CooperativeLaunchRefusedError(str(kernel)) from error

    return start_or_say


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def _picker(indices: list[int]) -> Callable[[list[int]], tuple[int, ...]]:
    if len(indices) == 1:
        index = indices[0]
        return lambda slots: (slots[index],)
    return itemgetter(*indices) if indices else lambda slots: ()


def runner_on_gpu(program: Any) -> Callable[[Sequence[Any], tuple[int, ...]], Any]:
    """A function that runs a program on CuPy arrays, on CuPy's current stream of their GPU."""
    cupy, device = import_cupy(), program.device
    current = cupy.cuda.device.get_device_id
    bound: list[BoundStep] | None = None

    def run(arrays: Sequence[Array], numbers: tuple[int, ...]) -> Any:
        nonlocal bound
        if current() != device:
            if graph_device.get() is not None:
                raise RuntimeError(
                    f"a graph holds the work of one GPU, {graph_device.get()}, which is current: got arrays on "
                    f"{device}; capture within `with cupy.cuda.Device({device})`"
                )
            with cupy.cuda.Device(device):
                return run(arrays, numbers)
        if bound is None:
            # Kernels are compiled and loaded here, at their first use.
            bound = [_bound(step, program, cupy) for step in program.steps]
        objects = [*arrays, *numbers]
        slots = [0 if array is None else array.data.ptr for array in arrays]
        slots += numbers
        for step in bound:
            step(objects, slots, None)
        return program.results(objects)

    return run


def _bound(step: Any, program: Any, cupy: ModuleType) -> BoundStep:
    if isinstance(step, Launch):
        return bound_launch(step, program.device)
    if isinstance(step, Allocate):
        return _bound_allocation(step, step.slot in program.needs_array, cupy)
    if isinstance(step, Views):
        return bound_views(step)
    if isinstance(step, Compute):

        def compute(objects: list[object], slots: list[int], stream: object) -> None:
            result = step.function(cupy, *[objects[slot] for slot in step.of])
            objects.append(result)
            slots.append(result.data.ptr)

        return compute
    if isinstance(step, Deliver):

        def deliver(objects: list[object], slots: list[int], stream: object) -> None:
            copy_into(cupy, objects[step.target], objects[step.source])

        return deliver
    raise TypeError(f"expected a step of a program, got {type(step).__name__}")


def bound_views(step: Views) -> BoundStep:
    """A function that adds the parts of an array, or their addresses alone."""
    of, nothing = step.of, [None] * len(step.slots)
    offsets = [offset * step.dtype.itemsize for offset in step.offsets]

    def views(objects: list[object], slots: list[int], stream: object) -> None:
        first = slots[of]
        objects.extend(nothing)
        slots.extend([first + offset for offset in offsets])

    def arrays(objects: list[Array], slots: list[int], stream: object) -> None:
        # Those that are results or copied have the array's dtype.
        flat, first = objects[of].reshape(-1), slots[of]
        objects.extend([flat[part].reshape(shape) for part, shape in step.parts])
        slots.extend([first + offset for offset in offsets])

    return arrays if step.are_arrays else views


def _bound_allocation(step: Allocate, is_array: bool, cupy: ModuleType) -> BoundStep:
    shape, dtype = step.shape, step.dtype
    size = math.prod(shape) * dtype.itemsize
    new_array, new_memory = cupy.ndarray, cupy.cuda.alloc
    memset, current_stream = cupy.cuda.runtime.memsetAsync, cupy.cuda.get_current_stream

    def allocate(objects: list[object], slots: list[int], stream: object) -> None:
        array = new_array(shape, dtype)
        objects.append(array)
        slots.append(array.data.ptr)

    def allocate_memory(objects: list[object], slots: list[int], stream: object) -> None:
        memory = new_memory(size)
        objects.append(memory)
        slots.append(memory.ptr)

    plain = allocate if is_array else allocate_memory
    if not step.zeroed:
        return plain

    def allocate_zeros(objects: list[object], slots: list[int], stream: object) -> None:
        plain(objects, slots, stream)
        memset(slots[-1], 0, size, current_stream().ptr)

    return allocate_zeros
