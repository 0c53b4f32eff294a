"""Compiling kernels with NVRTC, which needs no GPU and no driver."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gpu_layers.runtime.cache import cache_folder, writable_cache_folder, write_atomically
from gpu_layers.runtime.cuda import import_cupy
from gpu_layers.runtime.headers import cuda_header_folders
from gpu_layers.runtime.sources import source_folder, sources_digest


@dataclass(frozen=True)
class Architecture:
    """What to compile for.

    Attributes
    ----------
    capability : int
        10 times the compute capability: 90 for an H100.
    ptx : bool
        Whether to make PTX, which the driver translates for a newer GPU, instead of machine code.
    """

    capability: int
    ptx: bool = False


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


def _nvrtc() -> Any:
    return import_cupy().cuda.nvrtc


def options(architecture: Architecture) -> list[str]:
    """NVRTC's options: the same for every kernel, whoever compiles it.

    Subnormals are kept (``-ftz=false``), and a product and a sum become one rounding only where the source says
    ``fma`` (``-fmad=false``), so that the bits do not depend on the compiler's version, the GPU, or there being one.
    """
    headers = cuda_header_folders()
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
        Take what the compiler warns of for an error.

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
    nvrtc = _nvrtc()
    path = source_folder() / source
    # The #line makes compiler messages and profilers point to the file.
    text = f'#line 1 "{path}"\n{path.read_text(encoding="utf-8")}'
    program = nvrtc.createProgram(text, str(path), [], [])
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, tuple(options(architecture)))
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{source} does not compile ({error}):\n{nvrtc.getProgramLog(program)}") from error
        log = nvrtc.getProgramLog(program).strip("\0\n ")
        if log and warnings_as_errors:
            raise RuntimeError(f"{source} compiles with warnings:\n{log}")
        symbols = {name: nvrtc.getLoweredName(program, name) for name in names}
        code = nvrtc.getPTX(program) if architecture.ptx else nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)
    symbols = {name: s.decode() if isinstance(s, bytes) else s for name, s in symbols.items()}
    if isinstance(code, str):
        code = code.encode()
    # CuPy takes the data for a C string and drops its last byte, a NUL that a cubin's reader needs.
    return (code if architecture.ptx else code + b"\0"), symbols


@cache
def compiled_module(
    source: str, names: tuple[str, ...], architecture: Architecture, *, warnings_as_errors: bool = False
) -> CompiledModule:
    """:func:`compile_source`, kept in the user's cache folder from process to process."""
    identity = [sources_digest(), source, names, options(architecture), _nvrtc().getVersion(), warnings_as_errors]
    key = json.dumps(identity).encode()
    stem = cache_folder() / "cubin" / f"{Path(source).stem}-{hashlib.sha256(key).hexdigest()[:32]}"
    path = stem.with_suffix(".ptx" if architecture.ptx else ".cubin")
    index = stem.with_suffix(".json")
    symbols = _kept_symbols(path, index)
    if symbols is None:
        code, symbols = compile_source(source, names, architecture, warnings_as_errors=warnings_as_errors)
        writable_cache_folder("cubin")
        write_atomically(path, code)
        facts = {"sha256": hashlib.sha256(code).hexdigest(), "symbols": symbols}
        write_atomically(index, json.dumps(facts).encode())
    return CompiledModule(path, symbols)


def _kept_symbols(path: Path, index: Path) -> dict[str, str] | None:
    """The symbols of a compiled module; None where it is not there, or not as it was written."""
    try:
        facts = json.loads(index.read_text())
        whole = facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        return facts["symbols"] if whole else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
