"""A stand-in for what of CuPy needs a GPU: notes what is loaded and launched; may run it, emulated, where it lies."""

import ctypes
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from gpu_layers.runtime import gpu, nvrtc
from gpu_layers.runtime.emulation import Emulation
from gpu_layers.runtime.kernel import all_kernels

SHARED_BY_DEFAULT = 48 * 1024
STATIC_SHARED = 200


def _kernel():
    return SimpleNamespace(
        max_dynamic_shared_size_bytes=SHARED_BY_DEFAULT,
        shared_size_bytes=STATIC_SHARED,
        preferred_shared_memory_carveout=-1,
    )


class CUDADriverError(RuntimeError):
    """As CuPy's: begins with the name of the error."""


def device_class(cupy, capability, multiprocessors, shared_optin=227 * 1024):
    """CuPy's ``Device``; the number of the current one is in ``cupy.current``."""

    class Device:
        def __init__(self, number):
            self.id, self.compute_capability = number, capability
            self.attributes = {"MaxSharedMemoryPerBlockOptin": shared_optin, "MultiProcessorCount": multiprocessors}

        def __enter__(self):
            self.before, cupy.current = cupy.current, self.id

        def __exit__(self, *_):
            cupy.current = self.before

    return Device


def driver(launched, **others):
    """CuPy's binding of the driver: ``launched(function, grid, block, shared_bytes, stream, addresses, cooperative)``.

    ``addresses(count)`` are those of so many arguments. As with the driver, a context is current in the thread that
    made it and where it was set, and a launch needs one.
    """
    context = 7
    current = threading.local()
    current.context = context

    def set_current(given):
        assert given == context
        current.context = given

    def launch(cooperative, function, *numbers):
        if getattr(current, "context", None) is None:
            raise CUDADriverError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
        *grid, x, y, z, shared_bytes, stream, parameters = numbers
        launched(
            function,
            tuple(grid),
            (x, y, z),
            shared_bytes,
            stream,
            lambda count: list((ctypes.c_uint64 * count).from_address(parameters)),
            cooperative,
        )

    def launch_kernel(*numbers_and_extra):
        *numbers, extra = numbers_and_extra
        assert extra == 0
        launch(False, *numbers)

    return SimpleNamespace(
        CUDADriverError=CUDADriverError,
        launchKernel=launch_kernel,
        launchCooperativeKernel=lambda *numbers: launch(True, *numbers),
        ctxGetCurrent=lambda: current.context,
        ctxSetCurrent=set_current,
        **others,
    )


class FakeCupy:
    """One process with GPUs of some compute capability: notes what is loaded and launched, and which GPU is current."""

    def __init__(self, capability="90", supported=(75, 80, 90, 100), shared_optin=227 * 1024, execute=None):
        self.current, self.loaded, self.launches, self.refuses = None, [], [], None
        functions = {}
        cupy = self

        class RawModule:
            def __init__(self, *, path, enable_cooperative_groups):
                assert isinstance(path, str)
                self.key = (path, enable_cooperative_groups, cupy.current)
                cupy.loaded.append(self.key)

            def get_function(self, symbol):
                # CuPy loads a file once a device: the driver's function, and what was set for it, are shared.
                key = (*self.key, symbol)
                kernel = functions.setdefault(key, _kernel())

                kernel.symbol, kernel.kernel = symbol, SimpleNamespace(ptr=id(kernel))
                return kernel

        def launched(function, grid, block, shared_bytes, stream, addresses, cooperative):
            if cooperative and cupy.refuses:
                raise CUDADriverError(cupy.refuses)
            kernel = next(one for one in functions.values() if id(one) == function)
            launch = SimpleNamespace(symbol=kernel.symbol, grid=grid, block=block, shared_bytes=shared_bytes)
            launch.addresses = addresses(len(kernel_of(kernel.symbol).parameters))
            # What the driver reads: up to 8 bytes from each address on.
            launch.args = [ctypes.c_uint64.from_address(address).value for address in launch.addresses]
            launch.cooperative, launch.stream = cooperative, stream
            launch.device, launch.limit = cupy.current, kernel.max_dynamic_shared_size_bytes
            launch.carve_out = kernel.preferred_shared_memory_carveout
            cupy.launches.append(launch)
            if execute is not None:
                execute(launch)

        def occupancy(function, threads, shared_bytes):
            assert any(id(one) == function for one in functions.values())
            return min(228 * 1024 // (shared_bytes + STATIC_SHARED + 1024), 2048 // threads)

        nvrtc_module = SimpleNamespace(getSupportedArchs=lambda: supported)
        device = device_class(self, capability, 132, shared_optin)
        self.cuda = SimpleNamespace(
            Device=device,
            nvrtc=nvrtc_module,
            driver=driver(launched, occupancyMaxActiveBlocksPerMultiprocessor=occupancy),
            get_current_stream=lambda: SimpleNamespace(ptr=None),
        )
        self.RawModule = RawModule


def kernel_of(symbol):
    """The kernel of a function that was loaded."""
    return next(one for one in all_kernels() if f"_Z{one.name}" == symbol)


_CACHED = (gpu._architecture, gpu._raw_kernel, gpu._function, gpu.resident_blocks_of_gpu)


@contextmanager
def nothing_loaded():
    """Forgets what was loaded before and after."""

    def forget():
        for cached in _CACHED:
            cached.cache_clear()
        gpu._opted_in.clear()
        gpu._refused.clear()

    forget()
    yield
    forget()


@contextmanager
def stand_in(monkeypatch):
    """Makes a stand-in for CuPy; forgets what was loaded before and after."""

    def make(**facts):
        cupy = FakeCupy(**facts)
        monkeypatch.setattr(gpu, "import_cupy", lambda: cupy)
        monkeypatch.setattr(nvrtc, "nvrtc", lambda: cupy.cuda.nvrtc)
        compiled = lambda source, names, architecture: SimpleNamespace(  # noqa: E731
            path=f"{source} {architecture}", symbols={name: f"_Z{name}" for name in names}
        )
        monkeypatch.setattr(gpu, "compiled_module", compiled)
        return cupy

    with nothing_loaded():
        yield make


def execute(launch):
    """Run a launch on the memory that its arguments point to, as a driver does."""
    kernel = kernel_of(launch.symbol)
    values = [
        _at(argument if parameter.is_pointer else address, parameter.dtype)
        for parameter, argument, address in zip(kernel.parameters, launch.args, launch.addresses, strict=True)
    ]
    Emulation().launch(kernel, launch.grid, launch.block, values, launch.shared_bytes, launch.cooperative)


def _at(address, dtype):
    """One element at an address; the emulator takes no more of an array than where it is."""
    if not address:
        return None
    return np.ndarray(1, dtype, (ctypes.c_uint8 * dtype.itemsize).from_address(address))
