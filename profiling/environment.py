"""What a measurement must say of where it was taken: GPU, driver, versions, commit, date."""

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
from pathlib import Path
from typing import Any

from gpu_layers._version import __version__
from gpu_layers.runtime.cuda import require_gpu
from gpu_layers.runtime.sources import sources_digest

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
    parser = argparse.ArgumentParser(prog="python -m profiling.environment", description=main.__doc__)
    parser.parse_args(arguments)
    try:
        print(folder_name(environment(gpu=True)))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
