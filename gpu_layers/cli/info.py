"""``gpu-layers info``: what is installed on this machine, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from gpu_layers._version import __version__
from gpu_layers.cli.arguments import Commands
from gpu_layers.core.array import Facts
from gpu_layers.core.cache import cache_contents
from gpu_layers.core.cuda import INSTALL_ADVICE, import_cupy, require_gpu
from gpu_layers.core.headers import cuda_header_folders
from gpu_layers.distributed.mpi import MPI_ADVICE
from gpu_layers.emulator.defaults import cuda_headers
from gpu_layers.emulator.toolchain import find_compiler
from gpu_layers.kernels.batch_norm_plan import backward_plan, forward_plan
from gpu_layers.runtime.kernel import FLOAT_DTYPES
from gpu_layers.runtime.nvrtc import nvrtc

_TRAIN_PACKAGES = ("scikit-learn", "matplotlib", "rich", "safetensors", "threadpoolctl", "filelock")
_TRAIN_ADVICE = "pip install 'gpu-layers[train]'"
# Packages that `study` needs and `train` does not.
_STUDY_PACKAGES = ("Jinja2",)
_STUDY_ADVICE = "pip install 'gpu-layers[study]'"


def add_command(commands: Commands) -> None:
    """Add this command to the parser's."""
    parser = commands.add_parser(
        "info",
        help="show versions, backends, GPUs, and what is missing",
        description="Shows versions, backends and GPUs of this machine, what is missing, and how to install it.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--plan",
        metavar="SHAPE",
        type=_shape,
        help="instead: how batch norm would run on an input of this shape, N,C,H,W (or N,C), in each dtype and layout",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what is installed.

    Returns
    -------
    int
        Always 0.
    """
    if arguments.plan is not None:
        rows = batch_norm_plans(arguments.plan)
        print(json.dumps(rows, indent=2) if arguments.json else _plans_as_text(rows))
        return 0
    facts = machine_facts()
    print(json.dumps(facts, indent=2) if arguments.json else _as_text(facts))
    return 0


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.replace("x", ",").split(",")
    if not (2 <= len(sizes) <= 5 and all(size.strip().isdecimal() and int(size) > 0 for size in sizes)):
        raise argparse.ArgumentTypeError(f"a shape has 2 to 5 positive sizes, e.g. 64,256,56,56, got {text!r}")
    return tuple(int(size) for size in sizes)


def batch_norm_plans(shape: tuple[int, ...]) -> list[Facts]:
    """The rows of ``info --plan``: one for each dtype, layout and pass.

    Parameters
    ----------
    shape : tuple of int
        (N, C, *spatial).

    Returns
    -------
    list of dict
        ``dtype``, ``layout``, ``pass``, ``reads`` (of the data: 1 or 2), ``plan`` in words.
    """
    rows = []
    for dtype in FLOAT_DTYPES:
        for layout in ("NCHW", "NHWC") if len(shape) > 2 else ("rows",):
            laid_out = (shape[0], *shape[2:], shape[1]) if layout == "NHWC" else shape
            for name, planned in (("forward", forward_plan), ("backward", backward_plan)):
                plan = planned(laid_out, dtype.itemsize, layout == "NHWC")
                reads = 1 if plan.slots else 2
                rows.append({"dtype": str(dtype), "layout": layout, "pass": name, "reads": reads, "plan": str(plan)})
    return rows


def _plans_as_text(rows: list[dict[str, object]]) -> str:
    lines = [f"{row['dtype']:<9} {row['layout']:<5} {row['pass']:<9} {row['plan']}" for row in rows]
    return "\n".join(
        [
            *lines,
            "One read keeps its data in shared memory. A GPU that is too small takes two reads, with the same bits.",
        ]
    )


def machine_facts() -> Facts:
    """The content of ``info --json``.

    Returns
    -------
    dict
        ``versions``: of each package, None if it is missing. ``tools``: C++ compiler and folder of CUDA headers, None
        if missing. ``cache``: ``folder``, ``bytes``, and ``kernels`` compiled for GPUs there. ``backends``: of each,
        ``available`` and, if it is not, ``reason``. ``gpus``: a list of ``name``, ``compute_capability``,
        ``memory_gib``. ``missing`` and ``problems``: lists of ``what``, ``advice``.
    """
    compiler, no_compiler = _tried(lambda: find_compiler().version.splitlines()[0])
    _, no_emulation = _tried(lambda: (find_compiler(), cuda_headers()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report below covers what CuPy warns of
        cupy, no_cupy = _tried(import_cupy)
        compiler_version, no_nvrtc = _tried(lambda: nvrtc().getVersion())
        runtime_version, _ = _tried(lambda: import_cupy().cuda.runtime.runtimeGetVersion())
        gpus, no_gpu = _tried(lambda: _gpus(require_gpu()))
    other_cuda = bool(compiler_version and runtime_version) and compiler_version[0] != runtime_version // 1000
    headers = cuda_header_folders(compiler_version)
    cache = cache_contents()
    versions = {
        "gpu-layers": __version__,
        "Python": platform.python_version(),
        "NumPy": _version("numpy"),
        "ml_dtypes": _version("ml_dtypes"),
        "CuPy": cupy.__version__ if cupy else None,
        "NVRTC": _dotted(compiler_version) if compiler_version else None,
        **{package: _version(package) for package in (*_TRAIN_PACKAGES, *_STUDY_PACKAGES, "mpi4py")},
    }
    no_cuda = no_gpu or no_nvrtc or (None if headers else "no CUDA headers (cuda_fp16.h)")
    missing = [
        (no_cupy, "CuPy", INSTALL_ADVICE),
        (not no_cupy and no_nvrtc, "NVRTC", INSTALL_ADVICE),
        (other_cuda, "NVRTC of CuPy's CUDA version", INSTALL_ADVICE),
        (not no_cupy and no_gpu, "GPU", "an NVIDIA GPU and its driver: https://www.nvidia.com/drivers"),
        (
            not headers,
            "CUDA headers",
            "pip install nvidia-cuda-runtime (CUDA 13) or nvidia-cuda-runtime-cu12 (CUDA 12), or set CUDA_PATH",
        ),
        (no_compiler, "C++ compiler", "e.g. apt-get install g++, or set CXX"),
        *((versions[package] is None, package, _TRAIN_ADVICE) for package in _TRAIN_PACKAGES),
        *((versions[package] is None, package, _STUDY_ADVICE) for package in _STUDY_PACKAGES),
        (versions["mpi4py"] is None, "mpi4py", MPI_ADVICE),
    ]
    return {
        "versions": versions,
        "tools": {"C++ compiler": compiler, "CUDA headers": str(headers[0]) if headers else None},
        "backends": {"reference": _backend(None), "emulated": _backend(no_emulation), "cuda": _backend(no_cuda)},
        "cache": {"folder": str(cache.folder), "bytes": cache.size, "kernels": cache.kernels},
        "gpus": gpus or [],
        "missing": [{"what": what, "advice": advice} for is_missing, what, advice in missing if is_missing],
        "problems": _problems(no_cupy),
    }


def _problems(no_cupy: str | None) -> list[dict[str, str]]:
    """What is installed but does not work, and how to fix it."""
    packages = _cupy_packages()
    problems = []
    if len(packages) > 1:
        # They share the folder cupy: removing one removes files of the other.
        advice = f"pip uninstall {' '.join(packages)}; then one of them: {INSTALL_ADVICE}"
        problems.append({"what": f"{len(packages)} packages of CuPy: {', '.join(packages)}", "advice": advice})
    elif packages and no_cupy:
        problems.append({"what": f"{packages[0]} does not load", "advice": no_cupy})
    return problems


def _cupy_packages() -> list[str]:
    """Installed packages that bring the module ``cupy``: one for each version of CUDA, and one built from source."""
    names = {str(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    # cupy, cupy-cuda12x, cupy-cuda111, cupy-rocm-5-0
    return sorted(name for name in names if re.fullmatch(r"(?i)cupy([-_.](cuda|rocm)[-_.\w]*)?", name))


def _tried(look: Callable[[], object]) -> tuple[Any, str | None]:
    """The result of ``look()``, or None and the reason."""
    try:
        return look(), None
    # A broken installation of CuPy may raise anything; this command shows it.
    except Exception as error:
        return None, " ".join(str(error).split()) or type(error).__name__


def _gpus(cupy: ModuleType) -> list[Facts]:
    found = []
    for device in range(cupy.cuda.runtime.getDeviceCount()):
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        found.append(
            {
                "name": properties["name"].decode(),
                "compute_capability": f"{properties['major']}.{properties['minor']}",
                "memory_gib": round(properties["totalGlobalMem"] / 2**30, 1),
            }
        )
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _backend(reason: str | None) -> Facts:
    return {"available": True} if reason is None else {"available": False, "reason": reason}


def _as_text(facts: Facts) -> str:
    backends = {
        name: "yes" if backend["available"] else f"no: {backend['reason']}"
        for name, backend in facts["backends"].items()
    }
    gpus = {
        str(number): f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB"
        for number, gpu in enumerate(facts["gpus"])
    }
    sections = {
        "Versions": facts["versions"],
        "Tools": facts["tools"],
        "Cache": {
            "folder": facts["cache"]["folder"],
            "size": f"{facts['cache']['bytes'] / 2**20:.1f} MiB",
            "compiled kernels": facts["cache"]["kernels"],
        },
        "Backends": backends,
        "GPUs": gpus or {"none": ""},
        "Missing": {entry["what"]: entry["advice"] for entry in facts["missing"]} or {"nothing": ""},
    }
    if facts["problems"]:
        sections["Problems"] = {entry["what"]: entry["advice"] for entry in facts["problems"]}
    width = max(len(name) for section in sections.values() for name in section)
    lines = []
    for title, section in sections.items():
        lines.append(title)
        lines += [f"  {name:<{width}}  {'-' if value is None else value}".rstrip() for name, value in section.items()]
    return "\n".join(lines)
