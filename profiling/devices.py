"""Where kernels are timed, a GPU or, to test the benchmark, the emulated one; the GPUs that are modelled, and what a
measurement must say of where it was taken.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpu_layers._version import __version__
from gpu_layers.core import reference_gpu
from gpu_layers.core.cuda import gpu_is_lost, require_gpu
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.sources import sources_digest
from profiling.timing import HostTimer, Timer

# For float16 and bfloat16, which DLPack and older CuPy do not carry everywhere.
_BITS = {2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True)
class Gpu:
    """What the model of cost knows of a GPU.

    Attributes
    ----------
    name : str
    capability : int
        10 times the compute capability.
    multiprocessors : int
    clock : float
        Highest clock, in Hz.
    copy_rate : float
        What a large copy reaches, bytes read and written a second: some nine tenths of the memory's own rate.
    bytes_in_flight : int
        Bytes that a multiprocessor must have asked for at any time, to keep the memory busy.
    threads, blocks, registers, shared_bytes : int
        What a multiprocessor holds at once.
    lanes : int
        Thread instructions that a multiprocessor issues in a clock: four warps' of 32.
    """

    name: str
    capability: int
    multiprocessors: int
    clock: float
    copy_rate: float
    bytes_in_flight: int
    threads: int = reference_gpu.WARPS * reference_gpu.WARP_THREADS
    blocks: int = 32
    registers: int = 65536
    shared_bytes: int = reference_gpu.SHARED_BYTES
    lanes: int = 128

    @property
    def issue_rate(self) -> float:
        """Thread instructions a second."""
        return self.multiprocessors * self.lanes * self.clock

    @property
    def instructions_per_byte(self) -> float:
        """Thread instructions that can be issued while a byte is copied: 7.9 on an H200, 11 on an H100."""
        return self.issue_rate / self.copy_rate

    @property
    def latency(self) -> float:
        """Seconds that a read takes while the memory is busy (Little: bytes in flight over bytes a second)."""
        return self.bytes_in_flight * self.multiprocessors / self.copy_rate


#: Multiprocessors, clocks and limits: NVIDIA's data sheets and "CUDA C++ Programming Guide", "Compute
#: Capabilities". Of an H200 the rate of a copy and the bytes in flight are those of the run of 2026-11-29 in
#: ``profiling/results`` (see :mod:`profiling.model`). Of the others the rates are what such GPUs are commonly seen to
#: reach; bytes in flight follow Little's law from them and from the latency under load of their kinds of memory.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 1.41e9, 1.75e12, 16_000, shared_bytes=164 * 1024),
        Gpu("H100", 90, reference_gpu.MULTIPROCESSORS, 1.98e9, 3.0e12, 32_000),
        Gpu("H200", 90, reference_gpu.MULTIPROCESSORS, 1.98e9, 4.26e12, 48_000),
        Gpu("B200", 100, 148, 1.965e9, 6.9e12, 60_000),
    )
}
#: The one that tables and pictures speak of.
MODELLED = GPUS["H200"]


class Device(Protocol):
    """What the benchmark needs of a device.

    Attributes
    ----------
    kind : {"measured", "emulated"}
        What to call times taken here.
    xp : module
        NumPy or CuPy.
    timer : Timer
    l2_bytes : int
        Of the cache that must be cold.
    """

    kind: str
    xp: Any
    timer: Timer
    l2_bytes: int

    def activate(self) -> AbstractContextManager:
        """The context in which our operations take this device's arrays."""

    def free_bytes(self) -> int:
        """Memory that is free."""

    def release(self) -> None:
        """Give back the memory of arrays that are gone."""

    def is_lost(self) -> bool:
        """Whether nothing more can run, after an error."""

    def copy(self, target: Any, source: Any) -> None:
        """A plain copy of bytes, as fast as the device does it."""

    def to_torch(self, torch: Any, array: Any) -> Any:
        """A tensor in the same memory."""


class EmulatedDevice:
    """The CPU that executes the kernels' source. Its times say nothing of a GPU's."""

    kind = "emulated"
    xp: Any = np
    l2_bytes = 0

    def __init__(self) -> None:
        self.timer: Timer = HostTimer()

    def activate(self) -> AbstractContextManager:
        """The emulated backend."""
        return use_backend("emulated")

    def free_bytes(self) -> int:
        """Enough for toy sizes."""
        return 2**30

    def release(self) -> None:
        """Nothing is held."""

    def is_lost(self) -> bool:
        """Never."""
        return False

    def copy(self, target: Any, source: Any) -> None:
        """NumPy's."""
        target[...] = source

    def to_torch(self, torch: Any, array: Any) -> Any:
        """A CPU tensor in the same memory."""
        tensor = torch.from_numpy(array.view(_BITS[array.dtype.itemsize]))
        return tensor.view(getattr(torch, array.dtype.name))


class CudaTimer:
    """CUDA events on CuPy's current stream, which is PyTorch's too: both use the default one."""

    _STALL = r"""
    extern "C" __global__ void keep_busy(long long cycles) {
        const long long begin = clock64();
        while (clock64() - begin < cycles) {}
    }"""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._kernel = cupy.RawKernel(self._STALL, "keep_busy")
        self._host = HostTimer()
        # In kHz; 2 GHz where the driver does not say. It only sets how long the device is kept busy.
        self._cycles_per_second = 1000.0 * cupy.cuda.Device().attributes.get("ClockRate", 2_000_000)

    def stall(self, seconds: float) -> None:
        """One thread that watches the clock."""
        self._kernel((1,), (1,), (np.int64(seconds * self._cycles_per_second),))

    def mark(self) -> Any:
        """A recorded event."""
        event = self._cupy.cuda.Event()
        event.record()
        return event

    def passed(self, event: Any) -> bool:
        """Whether the device has got to an event."""
        return bool(event.done)

    def elapsed(self, start: Any, end: Any) -> float:
        """Seconds between two events, after waiting for both."""
        end.synchronize()
        return self._cupy.cuda.get_elapsed_time(start, end) / 1000.0

    def synchronize(self) -> None:
        """Wait for the whole device."""
        self._cupy.cuda.Device().synchronize()

    def now(self) -> float:
        """The host's clock, in seconds."""
        return self._host.now()


class CudaDevice:
    """CuPy's current GPU.

    Raises
    ------
    RuntimeError
        If there is none.
    """

    kind = "measured"

    def __init__(self) -> None:
        self.xp: Any = require_gpu()
        self.timer: Timer = CudaTimer(self.xp)
        self.l2_bytes = int(self.xp.cuda.Device().attributes["L2CacheSize"])

    def activate(self) -> AbstractContextManager:
        """The CUDA backend."""
        return use_backend("cuda")

    def free_bytes(self) -> int:
        """What the driver has free: call :meth:`release` first."""
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def release(self) -> None:
        """Empty CuPy's and PyTorch's pools."""
        self.timer.synchronize()
        self.xp.get_default_memory_pool().free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def is_lost(self) -> bool:
        """Whether an error stays with the process, as after an access outside of the memory."""
        return gpu_is_lost()

    def copy(self, target: Any, source: Any) -> None:
        """``cudaMemcpyAsync`` from device to device."""
        target.data.copy_from_device_async(source.data, source.nbytes)

    def to_torch(self, torch: Any, array: Any) -> Any:
        """A CUDA tensor in the same memory."""
        tensor = torch.from_dlpack(array.view(_BITS[array.dtype.itemsize]))
        return tensor.view(getattr(torch, array.dtype.name))


# ---- What a run was made with ----------------------------------------------------------------------------------------


_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("numpy", "torch", "triton", "jax")


def environment(gpu: bool) -> dict[str, Any]:
    """Facts about this machine and this source tree.

    Parameters
    ----------
    gpu : bool
        Whether to ask for the GPU's.

    Returns
    -------
    dict
        ``date`` (UTC), ``commit``, ``sources`` (digest of ``cuda_src``), ``python``, the versions of packages (None if
        missing), ``platform``; with a GPU ``gpu``, ``driver``, ``cuda``, ``cupy``, ``memory_gib``, ``l2_mib``,
        ``multiprocessors``, ``compute_capability``.
    """
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "sources": str(sources_digest())[:16],
        "gpu_layers": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
    }
    return facts | (_gpu_facts() if gpu else {"cpu": _cpu(), "cores": os.cpu_count()})


def commit() -> str:
    """Of the source tree, with a ``+`` if it was changed since; ``$GPU_LAYERS_COMMIT`` in a tree without git."""
    given = os.environ.get("GPU_LAYERS_COMMIT")
    if given:
        return given
    try:
        found = _output("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + ("+" if changed else "")


def folder_name(facts: dict[str, Any]) -> str:
    """Name of a run's folder in ``profiling/results``: sorts by date, and says which GPU and commit."""
    gpu = re.sub(r"[^a-z0-9]+", "-", str(facts.get("gpu", "no gpu")).lower()).strip("-")
    date = re.sub(r"[:]", "", str(facts["date"]))
    return f"{date}-{gpu}-{str(facts['commit']).rstrip('+')}"


def _gpu_facts() -> dict[str, Any]:
    cupy = require_gpu()
    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    runtime = cupy.cuda.runtime.runtimeGetVersion()
    return {
        "gpu": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": int(properties["multiProcessorCount"]),
        "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
        "l2_mib": round(properties["l2CacheSize"] / 2**20, 1),
        "driver": _driver(),
        "cuda": f"{runtime // 1000}.{runtime % 1000 // 10}",
        "cupy": cupy.__version__,
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    """Print the folder name of a run on this GPU.

    Returns
    -------
    int
        0, or 2 without a GPU (and the reason on standard error).
    """
    parser = argparse.ArgumentParser(prog="python -m profiling.devices", description=main.__doc__)
    parser.parse_args(arguments)
    try:
        print(folder_name(environment(gpu=True)))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
