"""Compiling kernels with NVRTC, which needs no GPU and no driver."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from gpu_layers.core.cache import CUBINS, cache_folder, writable_cache_folder, write_atomically
from gpu_layers.core.cuda import import_cupy
from gpu_layers.core.headers import cuda_header_folders
from gpu_layers.runtime.sources import source_folder, sources_digest


@dataclass(frozen=True)
class Architecture:
    """The target of a compilation.

    Attributes
    ----------
    capability : int
        10 times the compute capability: 90 for an H100.
    ptx : bool
        Whether to make PTX, which the driver translates for a newer GPU, instead of machine code.
    """

    capability: int
    ptx: bool = False


def architecture_for(capability: int) -> Architecture:
    """The target for a GPU: its own machine code, or PTX of the newest known architecture if it is newer than that.

    Parameters
    ----------
    capability : int
        10 times the compute capability.

    Returns
    -------
    Architecture

    Raises
    ------
    RuntimeError
        If this version of CUDA does not support a GPU as old as that, or CuPy is missing.
    """
    supported = [known for known in nvrtc().getSupportedArchs() if known <= capability]
    if not supported:
        raise RuntimeError(f"this version of CUDA does not support compute capability {capability / 10}")
    return Architecture(max(supported), ptx=max(supported) != capability)


@dataclass(frozen=True)
class CompiledModule:
    """Machine code on disk.

    Attributes
    ----------
    path : Path
        The cubin (or PTX).
    symbols : dict of str to str
        Mangled symbol of each name expression.
    """

    path: Path
    symbols: dict[str, str]


# NVRTC in pip's wheels, by CUDA's major version.
_WHEEL_LIBRARIES = {12: "nvidia/cuda_nvrtc/lib/libnvrtc.so.12", 13: "nvidia/cu13/lib/libnvrtc.so.13"}


def nvrtc() -> ModuleType:
    """CuPy's module ``nvrtc``, with the library of CuPy's own CUDA version if it can be found.

    Raises
    ------
    RuntimeError
        If CuPy is missing.
    """
    cupy = import_cupy()
    _open_library(cupy.cuda.runtime.runtimeGetVersion() // 1000)
    return cupy.cuda.nvrtc


@cache
def _open_library(cuda: int) -> None:
    """Open NVRTC of a major version of CUDA before CuPy does; CuPy then uses it.

    If another package brings NVRTC of a newer CUDA, as PyTorch does, CuPy would use that one, and an older driver would
    refuse its machine code.
    """
    for folder in sys.path if cuda in _WHEEL_LIBRARIES else ():
        path = Path(folder, _WHEEL_LIBRARIES[cuda])
        if path.is_file():
            # NVRTC opens its built-in declarations by name when it compiles. That of CUDA 13.0 does not look in its
            # own folder, but an open library is found by its name.
            for library in (*sorted(path.parent.glob(f"libnvrtc-builtins.so.{cuda}.*")), path):
                # If it does not load, CuPy looks elsewhere, and says what is missing.
                with suppress(OSError):
                    ctypes.CDLL(str(library))
            return


def options(architecture: Architecture) -> list[str]:
    """NVRTC's options, the same for every kernel and every caller.

    Subnormals are kept (``-ftz=false``), and a product and a sum become one rounding only where the source says
    ``fma`` (``-fmad=false``), so that the bits do not depend on the compiler's version, the GPU, or there being one.
    """
    headers = cuda_header_folders(nvrtc().getVersion())
    if not headers:
        raise RuntimeError(
            "the CUDA headers (cuda_fp16.h) were not found: pip install nvidia-cuda-runtime (CUDA 13) "
            "or nvidia-cuda-runtime-cu12 (CUDA 12), or set CUDA_PATH to a toolkit"
        )
    target = "compute" if architecture.ptx else "sm"
    return [
        f"--gpu-architecture={target}_{architecture.capability}",
        "--std=c++17",
        "-ftz=false",
        "-fmad=false",
        "-default-device",
        "-lineinfo",
        f"-I{source_folder()}",
        *(f"-I{folder}" for folder in headers),
    ]


def compile_source(
    source: str, names: Sequence[str], architecture: Architecture, *, warnings_as_errors: bool = False
) -> tuple[bytes, dict[str, str]]:
    """Compile name expressions of one file.

    Parameters
    ----------
    source : str
        File in ``cuda_src/``.
    names : sequence of str
        C++ name expressions.
    architecture : Architecture
    warnings_as_errors : bool
        Treat the compiler's warnings as errors.

    Returns
    -------
    code : bytes
        Cubin or PTX.
    symbols : dict of str to str
        Mangled symbol of each name.

    Raises
    ------
    RuntimeError
        If CuPy, NVRTC or the CUDA headers are missing, or the source does not compile (with the compiler's log).
    """
    compiler = nvrtc()
    path = source_folder() / source
    # The #line makes compiler messages and profilers point to the file.
    text = f'#line 1 "{path}"\n{path.read_text(encoding="utf-8")}'
    program = compiler.createProgram(text, str(path), [], [])
    try:
        for name in names:
            compiler.addNameExpression(program, name)
        try:
            compiler.compileProgram(program, tuple(options(architecture)))
        except compiler.NVRTCError as error:
            raise RuntimeError(f"{source} does not compile ({error}):\n{compiler.getProgramLog(program)}") from error
        log = compiler.getProgramLog(program).strip("\0\n ")
        if log and warnings_as_errors:
            raise RuntimeError(f"{source} compiles with warnings:\n{log}")
        symbols = {name: compiler.getLoweredName(program, name) for name in names}
        code = compiler.getPTX(program) if architecture.ptx else compiler.getCUBIN(program)
    finally:
        compiler.destroyProgram(program)
    symbols = {name: s.decode() if isinstance(s, bytes) else s for name, s in symbols.items()}
    if isinstance(code, str):
        code = code.encode()
    # CuPy treats the data as a C string and drops its last byte, a NUL that readers of a cubin need.
    return (code if architecture.ptx else code + b"\0"), symbols


def cached_module(
    source: str, names: tuple[str, ...], architecture: Architecture, *, warnings_as_errors: bool = False
) -> CompiledModule | None:
    """The module that :func:`compiled_module` finds in the cache; None if it would have to compile."""
    path, index = _files(source, names, architecture, warnings_as_errors)
    symbols = _kept_symbols(path, index)
    return None if symbols is None else CompiledModule(path, symbols)


@cache
def compiled_module(
    source: str, names: tuple[str, ...], architecture: Architecture, *, warnings_as_errors: bool = False
) -> CompiledModule:
    """:func:`compile_source`, kept in the user's cache folder from process to process."""
    found = cached_module(source, names, architecture, warnings_as_errors=warnings_as_errors)
    if found is not None:
        return found
    path, index = _files(source, names, architecture, warnings_as_errors)
    code, symbols = compile_source(source, names, architecture, warnings_as_errors=warnings_as_errors)
    writable_cache_folder(CUBINS)
    write_atomically(path, code)
    facts = {"sha256": hashlib.sha256(code).hexdigest(), "symbols": symbols}
    write_atomically(index, json.dumps(facts).encode())
    return CompiledModule(path, symbols)


def _files(
    source: str, names: tuple[str, ...], architecture: Architecture, warnings_as_errors: bool
) -> tuple[Path, Path]:
    """Paths of the code and of its symbols; the names hash everything that they depend on."""
    identity = [sources_digest(), source, names, options(architecture), nvrtc().getVersion(), warnings_as_errors]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    stem = cache_folder() / CUBINS / f"{Path(source).stem}-{key}"
    return stem.with_suffix(".ptx" if architecture.ptx else ".cubin"), stem.with_suffix(".json")


def _kept_symbols(path: Path, index: Path) -> dict[str, str] | None:
    """The symbols of a compiled module; None if it is missing or damaged."""
    try:
        facts = json.loads(index.read_text())
        whole = facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        return facts["symbols"] if whole else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
