"""Running kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from .errors import EmulationError, ToolchainError
from .toolchain import find_compiler

_MARKER = "GPU_LAYERS_SANITIZER"


def _library(compiler: tuple[str, ...], name: str) -> str:
    finished = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = finished.stdout.strip()
    if not Path(path).is_absolute():
        raise ToolchainError(f"{shlex.join(compiler)} has no {name}: install the sanitizers of this compiler")
    return os.path.realpath(path)


def sanitizer_environment(mode: str) -> dict[str, str]:
    """The environment for a process that runs modules of this mode.

    AddressSanitizer must be the first library of its process, so it cannot be loaded into a Python that
    already runs: start another with this environment. What it finds ends that process with a report.

    Parameters
    ----------
    mode : {"asan", "ubsan"}

    Returns
    -------
    dict of str to str
        This process's environment and what the sanitizer needs.

    Raises
    ------
    ToolchainError
        If the compiler has no sanitizer libraries.
    """
    if mode not in ("asan", "ubsan"):
        raise ValueError(f"sanitizer mode must be 'asan' or 'ubsan', got {mode!r}")
    environment = {**os.environ, _MARKER: mode}
    if mode == "ubsan":
        environment["UBSAN_OPTIONS"] = "print_stacktrace=1:halt_on_error=1"
        return environment
    command = find_compiler().command
    # The C++ library too: loaded later, it would throw past AddressSanitizer's back.
    environment["LD_PRELOAD"] = ":".join(_library(command, name) for name in ("libasan.so", "libstdc++.so.6"))
    # Python leaks on purpose; kernels own nothing.
    environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:exitcode=99"
    return environment


def check_environment(mode: str) -> None:
    """Refuse to load an AddressSanitizer module into a process that cannot hold it.

    Raises
    ------
    EmulationError
    """
    if mode == "asan" and os.environ.get(_MARKER) != mode:
        raise EmulationError(
            "AddressSanitizer cannot be loaded into a running process: start one with "
            "env=sanitizer_environment('asan') and load the module there"
        )
