"""The folders of gpu_layers, which the emulator uses where its caller names none: its only tie to the library."""

from __future__ import annotations

import functools
import os
import pathlib

from gpu_layers.core.cache import cache_folder
from gpu_layers.core.headers import cuda_header_folders

from .errors import ToolchainError

#: What helps where nothing can be written to the folder of modules.
ADVICE = "set GPU_LAYERS_CACHE_DIR to another folder"


def modules_folder() -> pathlib.Path:
    """Where compiled modules are kept: in the cache folder of gpu_layers.

    Raises
    ------
    RuntimeError
        If there is no home folder for it.
    """
    return cache_folder() / "emulator"


@functools.lru_cache(maxsize=8)
def _found(*_environment: str | None) -> pathlib.Path | None:
    folders = cuda_header_folders()
    return folders[0] if folders else None


def cuda_headers() -> pathlib.Path:
    """The folder with ``cuda_fp16.h``: from a pip wheel, else from a CUDA toolkit.

    Raises
    ------
    ToolchainError
        If there is none; the message names the package to install.
    """
    folder = _found(os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"))
    if folder is not None:
        return folder
    raise ToolchainError(
        "the emulated backend needs the CUDA headers (cuda_fp16.h) and found none: "
        "`pip install nvidia-cuda-runtime` (CUDA 13) or `pip install nvidia-cuda-runtime-cu12`, "
        "or set CUDA_PATH to a toolkit"
    )
