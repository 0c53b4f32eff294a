"""Running programs on a GPU: loading compiled kernels, binding launches to them, starting them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Container, Sequence
from functools import cache, partial
from itertools import groupby
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
# Bytes of an array that shares a piece of memory with others, which may outlive it: to ask for memory takes the host
# as long as a launch does.
_SMALL = 16 * 1024
# Where arrays in it begin: at multiples of what the driver aligns memory to.
_APART = 256
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


def bound_launches(steps: Sequence[Launch], slots: int, device: int) -> BoundStep:
    """A function that starts launches one after the other, with the pointers and numbers in so many slots.

    A buffer holds the slots, which each call writes by one ``pack``, and after them the constants. The driver takes the
    address of each argument of a launch, there. Its own function starts a kernel: CuPy's launch reads each argument
    again, and makes a cooperative grid smaller that does not fit, whose blocks would then wait for ever.
    """
    cuda = import_cupy().cuda
    driver, current_stream = cuda.driver, cuda.get_current_stream
    content = bytearray(_aligned(_POINTER * slots))
    places: list[list[int]] = []
    for step in steps:
        places.append([])
        for argument in step.arguments:
            if isinstance(argument, Slot):
                places[-1].append(_POINTER * argument.index)
            else:
                places[-1].append(len(content))
                constant = bytes(_POINTER) if argument is None else argument.tobytes()
                # At a multiple of 16 bytes, which suffices for every type.
                content += constant.ljust(_aligned(len(constant)), b"\0")
    functions = []
    for step in steps:
        function = _function(step.kernel, device, step.cooperative, step.shared_bytes)
        launch = driver.launchCooperativeKernel if step.cooperative else driver.launchKernel
        functions.append(partial(launch, function.ptr, *step.grid, *step.block, step.shared_bytes))

    def prepared() -> tuple[Any, list[Any], list[Any]]:
        """A buffer, the launches that read it, and the addresses that these are told the place of."""
        buffer = (ctypes.c_uint64 * (len(content) // _POINTER)).from_buffer_copy(content)
        base = ctypes.addressof(buffer)
        addresses = [(ctypes.c_uint64 * len(of_step))(*[base + place for place in of_step]) for of_step in places]
        launches = []
        for launch, of_step, step in zip(functions, addresses, steps, strict=True):
            # No further ones in the last argument, which a cooperative launch lacks.
            rest = (ctypes.addressof(of_step),) if step.cooperative else (ctypes.addressof(of_step), 0)
            launches.append((launch, rest, step))
        return buffer, launches, addresses

    pack = struct.Struct(f"{slots}Q").pack_into
    driver_error, context = driver.CUDADriverError, driver.ctxGetCurrent()
    # The driver copies the arguments before a launch returns. Of threads that launch at once each has its own: what a
    # lock would do takes longer.
    free = [prepared()]

    def start(objects: Any, values: list[int], stream: Any) -> None:
        try:
            taken = free.pop()
        except IndexError:
            taken = prepared()
        buffer, launches, _ = taken
        pack(buffer, 0, *values)
        handle = (current_stream() if stream is None else stream).ptr
        for launch, rest, step in launches:
            try:
                launch(handle, *rest)
            except driver_error as error:  # noqa: PERF203 - of each launch
                again(partial(launch, handle, *rest), step, error)
        free.append(taken)

    def again(launch: Callable[[], None], step: Launch, error: Exception) -> None:
        if str(error).startswith(_NO_CONTEXT):
            # The first call of CUDA in this thread: only the runtime's functions would have made it current. It is the
            # one in which the function was loaded.
            driver.ctxSetCurrent(context)
            try:
                return launch()
            except driver_error as another:
                error = another
        if not step.cooperative or not str(error).startswith(_REFUSALS):
            raise error
        _refused.add((step.kernel, device))
        raise CooperativeLaunchRefusedError(str(step.kernel)) from error

    return start


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def bound_steps(program: Any, bind: Callable[[list[Any]], list[BoundStep]]) -> list[BoundStep]:
    """The steps as they run; ``bind`` takes some of one type that follow one another.

    Memory comes first, then the parts of it and of the arrays that are given, so that more launches follow one another.
    """
    made = {step.slot for step in program.steps if isinstance(step, Compute)}

    def order(step: Any) -> int:
        if isinstance(step, Views) and step.of in made:
            made.update(step.slots)
        return 0 if isinstance(step, Allocate) else 1 if isinstance(step, Views) and step.of not in made else 2

    return [one for _, group in groupby(sorted(program.steps, key=order), type) for one in bind(list(group))]


def runner_on_gpu(program: Any) -> Callable[[Sequence[Any], list[int], tuple[int, ...]], Any]:
    """A function that runs a program on CuPy arrays, on CuPy's current stream of their GPU."""
    cupy, device = import_cupy(), program.device
    current, results = cupy.cuda.device.get_device_id, program.results
    more = program.slots - len(program.operands) - len(program.numbers)
    nothing, zeros = [None] * more, [0] * more
    bound: list[BoundStep] = []

    def run(arrays: Sequence[Array], addresses: list[int], numbers: tuple[int, ...]) -> Any:
        if current() != device:
            if graph_device.get() is not None:
                raise RuntimeError(
                    f"a graph holds the work of one GPU, {graph_device.get()}, which is current: got arrays on "
                    f"{device}; capture within `with cupy.cuda.Device({device})`"
                )
            with cupy.cuda.Device(device):
                return run(arrays, addresses, numbers)
        if not bound:
            # Kernels are compiled and loaded here, at their first use.
            bound[:] = bound_steps(program, lambda steps: _bound(steps, program, cupy))
        objects = [*arrays, *numbers, *nothing]
        slots = [*addresses, *numbers, *zeros]
        for step in bound:
            step(objects, slots, None)
        return results(objects)

    return run


def _bound(steps: list[Any], program: Any, cupy: ModuleType) -> list[BoundStep]:
    kind = type(steps[0])
    if kind is Launch:
        return [bound_launches(steps, program.slots, program.device)]
    if kind is Allocate:
        small = [step for step in steps if step.size <= _SMALL]
        pieces = [small] * bool(small) + [[step] for step in steps if step.size > _SMALL]
        views = [step for step in program.steps if isinstance(step, Views)]
        return [_bound_memory(piece, views, program.needs_array, cupy) for piece in pieces]
    if kind is Views:
        # Those that are results or copied have the array's dtype.
        part_of = lambda array, first, shape: cupy.ndarray(  # noqa: E731
            shape, array.dtype, array.data + first * array.dtype.itemsize
        )
        # Those of memory that is allocated are there with it.
        allocated = [step.slot for step in program.steps if isinstance(step, Allocate)]
        there = {slot for step in steps if step.of in allocated for slot in step.slots}
        return bound_views(steps, program, program.needs_array - there, part_of)
    if kind is Compute:
        return [_bound_computation(step, cupy) for step in steps]
    if kind is Deliver:
        return [_bound_delivery(step, cupy) for step in steps]
    raise TypeError(f"expected steps of a program, got {kind.__name__}")


def _bound_computation(step: Compute, cupy: ModuleType) -> BoundStep:
    def compute(objects: list[Any], slots: list[int], stream: object) -> None:
        result = step.function(cupy, *[objects[slot] for slot in step.of])
        objects[step.slot], slots[step.slot] = result, result.data.ptr

    return compute


def _bound_delivery(step: Deliver, cupy: ModuleType) -> BoundStep:
    def deliver(objects: list[Any], slots: list[int], stream: object) -> None:
        copy_into(cupy, objects[step.target], objects[step.source])

    return deliver


def bound_views(
    steps: Sequence[Views], program: Any, needs_array: Container[int], part_of: Callable[..., Any]
) -> list[BoundStep]:
    """Functions that put the parts of arrays in their slots: arrays where they are needed, and the addresses.

    ``part_of(array, first, shape)`` is an array on part of the memory of another, after so many elements.
    """
    used = set(program.needs_array)
    used.update(
        argument.index
        for step in program.steps
        if isinstance(step, Launch)
        for argument in step.arguments
        if isinstance(argument, Slot)
    )
    places: list[tuple[int, int, int]] = []
    for step in reversed(steps):
        wanted = [
            (slot, step.of, offset * step.dtype.itemsize)
            for slot, offset in zip(step.slots, step.offsets, strict=True)
            if slot in used
        ]
        places[:0] = wanted
        used.update([step.of] if wanted else [])

    def addresses(objects: object, slots: list[int], stream: object) -> None:
        for slot, of, offset in places:
            slots[slot] = slots[of] + offset

    bound: list[BoundStep] = [addresses] if places else []
    for step in steps:
        parts = [part for part in zip(step.slots, step.offsets, step.shapes, strict=True) if part[0] in needs_array]
        if parts:
            bound.append(_bound_parts(step.of, parts, part_of))
    return bound


def _bound_parts(of: int, parts: list[tuple[int, int, tuple[int, ...]]], part_of: Callable[..., Any]) -> BoundStep:
    def arrays(objects: list[Any], slots: object, stream: object) -> None:
        whole = objects[of]
        for slot, first, shape in parts:
            objects[slot] = part_of(whole, first, shape)

    return arrays


def _bound_memory(
    steps: list[Allocate], views: list[Views], needs_array: frozenset[int], cupy: ModuleType
) -> BoundStep:
    """A function that makes arrays in one piece of memory, those of zeros first, and those that are parts of them."""
    workspace, arrays, size, zeroed = [], [], 0, 0
    for step in sorted(steps, key=lambda step: not step.zeroed):
        of_parts = [
            (slot, size + offset * view.dtype.itemsize, shape, view.dtype)
            for view in views
            if view.of == step.slot
            for slot, offset, shape in zip(view.slots, view.offsets, view.shapes, strict=True)
        ]
        made = [one for one in ((step.slot, size, step.shape, step.dtype), *of_parts) if one[0] in needs_array]
        # CuPy finds the dtypes of NumPy sooner by their letters.
        arrays += [(*one[:3], one[3].char if one[3].isbuiltin == 1 else one[3]) for one in made]
        if step.slot not in needs_array:
            workspace.append((step.slot, size))
        size += -(-step.size // _APART) * _APART
        zeroed = size if step.zeroed else zeroed
    new_array, new_memory = cupy.ndarray, cupy.cuda.alloc
    memset, current_stream = cupy.cuda.runtime.memsetAsync, cupy.cuda.get_current_stream

    def allocate(objects: list[Any], slots: list[int], stream: object) -> None:
        memory = new_memory(size)
        first = memory.ptr
        if zeroed:
            memset(first, 0, zeroed, current_stream().ptr)
        for slot, offset in workspace:
            slots[slot] = first + offset
        for slot, offset, shape, dtype in arrays:
            slots[slot] = first + offset
            objects[slot] = new_array(shape, dtype, memory + offset if offset else memory)
        # Beyond the slots: until all is launched, nobody else gets it.
        objects.append(memory)

    return allocate
