"""Where the CUDA headers (``cuda_fp16.h`` and others) are on this machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# Layouts of NVIDIA's wheels in site-packages: CUDA 13, CUDA 12.
_WHEEL_FOLDERS = ("nvidia/cu13/include", "nvidia/cuda_runtime/include")
# Who brings nv/target: NVIDIA's CCCL wheels (13, 12), CuPy's bundled copy.
_TARGET_FOLDERS = (
    "nvidia/cu13/include/cccl",
    "nvidia/cuda_cccl/include",
    "cupy/_core/include/cupy/_cccl/libcudacxx",
)


def _package_folders() -> list[Path]:
    """Where packages are imported from: site-packages, the user's own, and what ``PYTHONPATH`` names."""
    return list(dict.fromkeys(Path(folder) for folder in sys.path if folder))


def _toolkits() -> list[Path]:
    """Roots of toolkits outside of Python, those that the user names first."""
    found = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")]
    if conda := os.environ.get("CONDA_PREFIX"):
        found += [conda, f"{conda}/targets/x86_64-linux"]
    if compiler := shutil.which("nvcc"):
        found.append(str(Path(compiler).resolve().parents[1]))
    return [Path(toolkit) for toolkit in (*found, "/usr/local/cuda") if toolkit]


def cuda_header_folders() -> list[Path]:
    """Include folders that hold ``cuda_fp16.h``, ``cuda_bf16.h`` and ``nv/target``.

    pip's wheels first, then the toolkit that ``CUDA_PATH`` or ``CUDA_HOME`` names, then those of Conda, of the ``nvcc``
    on the path, and ``/usr/local/cuda``.

    Returns
    -------
    list of Path
        Empty where there are none.
    """
    packages = _package_folders()
    candidates = [package / folder for package in packages for folder in _WHEEL_FOLDERS]
    candidates += [toolkit / "include" for toolkit in _toolkits()]
    for folder in candidates:
        if (folder / "cuda_fp16.h").is_file():
            break
    else:
        return []
    targets = [folder, folder / "cccl"] + [package / name for package in packages for name in _TARGET_FOLDERS]
    found = next((target for target in targets if (target / "nv" / "target").is_file()), None)
    return [folder] if found in (None, folder) else [folder, found]
