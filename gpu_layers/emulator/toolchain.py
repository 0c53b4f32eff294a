"""The host compiler that emulation needs, its flags, and the CUDA headers that it reads."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass

from .errors import ToolchainError

#: The modes a module can be built for, and the flags that make them.
MODE_FLAGS: dict[str, tuple[str, ...]] = {
    # Some 40 % of what -O2 takes to compile, 75 % of -O1, and next to nothing longer to run.
    "fast": ("-Og",),
    # Every load and store calls back into the runtime, which replaces the sanitizer's own library.
    # Without SRA a 16-byte struct copy stays one access; debug information gives each access its line.
    "trace": (
        "-O1",
        "-gdwarf-4",  # of version 5 the assembler would have to be told, see build.py
        "-fno-var-tracking",  # where variables lie nobody asks, and to find it takes a quarter of the time
        "-fsanitize=thread",
        "-fno-tree-sra",
        "-fno-optimize-sibling-calls",
        "--param=tsan-instrument-func-entry-exit=0",
    ),
    # The sanitizers compile most of the time: not optimised, and with calls for checks, it is the least in all.
    "asan": (
        "-O0",
        "-g1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address",
        "--param=asan-instrumentation-with-call-threshold=0",
    ),
    "ubsan": (
        "-O0",
        "-g1",
        "-fno-omit-frame-pointer",
        "-fsanitize=undefined",
        "-fsanitize=bounds-strict",  # also of the last array of a struct
        "-fno-sanitize-recover=all",
    ),
}

_COMMON_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fno-strict-aliasing",  # kernels read float arrays as float4, as CUDA allows
    "-ffp-contract=off",  # a * b + c is two roundings unless the kernel says fmaf
    "-fvisibility=hidden",
    "-fno-gnu-unique",  # so that two modules with the same kernel keep apart
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to leave a signal stack
    "-w",  # the CUDA headers and device idioms warn a lot; -Wall is the CUDA compiler's business
)

_HEADERS = (
    "cuda_fp16.h",
    "cuda_fp16.hpp",
    "cuda_bf16.h",
    "cuda_bf16.hpp",
    "vector_types.h",
    "vector_functions.h",
    "vector_functions.hpp",
)


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes
    ----------
    command : tuple of str
        Path of the executable, and what ``CXX`` has after its name: ``ccache g++``, ``g++ -m64``.
    version : str
        What it says of itself; a part of every cache key.
    is_gcc : bool
        Checked mode and the sanitizers need GCC: they rely on how it instruments memory accesses.
    """

    command: tuple[str, ...]
    version: str
    is_gcc: bool


@functools.lru_cache(maxsize=8)
def _describe(command: tuple[str, ...]) -> Compiler:
    try:
        finished = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", check=False
        )
        version, errors = finished.stdout.strip(), finished.stderr.strip()
    except OSError as error:
        version, errors = "", str(error)
    if not version or finished.returncode != 0:
        raise ToolchainError(f"the C++ compiler {shlex.join(command)} does not run: {errors}")
    return Compiler(command, version, "clang" not in version.lower())


def _cxx_words(value: str) -> list[list[str]]:
    """What ``CXX`` may mean: an executable, whose name may have spaces, or a command line."""
    try:
        return [[value], shlex.split(value)]
    except ValueError:  # a quotation mark that nothing closes
        return [[value]]


def find_compiler() -> Compiler:
    """``$CXX``, which may have arguments, else g++, else clang++.

    Raises
    ------
    ToolchainError
        If there is none; the message names the package to install.
    """
    if platform.system() != "Linux":
        raise ToolchainError("the emulated backend needs Linux: it relies on its loader and debug formats")
    wanted = os.environ.get("CXX", "").strip()
    for words in _cxx_words(wanted) if wanted else [["g++"], ["clang++"]]:
        path = shutil.which(words[0])
        if path is not None:
            return _describe((path, *words[1:]))
    if wanted:
        raise ToolchainError(f"the C++ compiler CXX={wanted} was not found; unset CXX to use g++ or clang++")
    raise ToolchainError(
        "the emulated backend compiles kernels with a C++ compiler and found none: install one, "
        "e.g. `apt-get install g++`, or set CXX"
    )


@functools.lru_cache(maxsize=8)
def headers_digest(folder: pathlib.Path) -> str:
    """SHA-256 of the CUDA headers that reach a module."""
    digest = hashlib.sha256()
    for name in _HEADERS:
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _processor_flags() -> tuple[str, ...]:
    # Without it each fmaf() is a call into the C library. It never changes a result.
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    return ("-mfma",) if platform.machine() == "x86_64" and " fma " in text else ()


def compile_flags(mode: str, compiler: Compiler) -> list[str]:
    """Every flag but the include folders.

    Raises
    ------
    ValueError
        For an unknown mode.
    ToolchainError
        For any mode but "fast" without GCC.
    """
    if mode not in MODE_FLAGS:
        raise ValueError(f"mode must be one of {', '.join(MODE_FLAGS)}, got {mode!r}")
    if mode != "fast" and not compiler.is_gcc:
        raise ToolchainError(
            f"mode {mode!r} needs g++ (`apt-get install g++`), but the compiler is {shlex.join(compiler.command)}, "
            "whose sanitizers have other entry points"
        )
    flags = [*_COMMON_FLAGS, *MODE_FLAGS[mode], *_processor_flags()]
    if not compiler.is_gcc:
        flags.remove("-fno-gnu-unique")
    if os.environ.get("GPU_LAYERS_EMULATOR_UCONTEXT") == "1":
        flags.append("-DGPU_LAYERS_UCONTEXT")
    return [*flags, "-DGPU_LAYERS_EMULATED", f"-DGPU_LAYERS_CHECKED={int(mode == 'trace')}"]
