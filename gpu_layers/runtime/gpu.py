"""Loading compiled kernels on a GPU, and launching them there."""

from __future__ import annotations

from functools import cache
from typing import Any

from gpu_layers.runtime.cuda import import_cupy
from gpu_layers.runtime.kernel import Kernel
from gpu_layers.runtime.nvrtc import Architecture, architecture_for, compiled_module


@cache
def _architecture(device: int) -> Architecture:
    return architecture_for(int(import_cupy().cuda.Device(device).compute_capability))


@cache
def _raw_kernel(kernel: Kernel, device: int, cooperative: bool) -> Any:
    """The loaded kernel. The caller has made ``device`` current, in whose context the module is loaded."""
    cupy = import_cupy()
    module = compiled_module(kernel.source, (kernel.name,), _architecture(device))
    raw_module = cupy.RawModule(path=str(module.path), enable_cooperative_groups=cooperative)
    return raw_module.get_function(module.symbols[kernel.name])


@cache
def _function(kernel: Kernel, device: int, cooperative: bool, shared_bytes: int) -> Any:
    """The function that is launched with this much shared memory; likewise."""
    raw_kernel = _raw_kernel(kernel, device, cooperative)
    # The limit is the loaded function's, which every amount of shared memory shares: it only ever grows.
    if shared_bytes > raw_kernel.max_dynamic_shared_size_bytes:
        raw_kernel.max_dynamic_shared_size_bytes = shared_bytes
    return raw_kernel.kernel


def launch_on_gpu(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    values: list[Any],
    device: int,
    shared_bytes: int,
    cooperative: bool,
) -> None:
    """Launch on the current stream of ``device``; ``values`` are bound and checked (see ``launch``)."""
    cupy = import_cupy()
    with cupy.cuda.Device(device):
        function = _function(kernel, device, cooperative, shared_bytes)
        function(grid, block, tuple(values), shared_mem=shared_bytes, enable_cooperative_groups=cooperative)


@cache
def resident_blocks_of_gpu(kernel: Kernel, threads: int, shared_bytes: int, device: int, cooperative: bool) -> int:
    """Blocks that ``device`` holds at once; 0 if it has not enough shared memory for one.

    Of the function that a launch with ``cooperative`` takes: the other would be loaded for this alone.
    """
    cupy = import_cupy()
    current = cupy.cuda.Device(device)
    with current:
        static = _raw_kernel(kernel, device, cooperative).shared_size_bytes
        if static + shared_bytes > current.attributes["MaxSharedMemoryPerBlockOptin"]:
            return 0
        function = _function(kernel, device, cooperative, shared_bytes)
        per_multiprocessor = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            function.ptr, threads, shared_bytes
        )
        return per_multiprocessor * current.attributes["MultiProcessorCount"]
