"""Where the CUDA headers (``cuda_fp16.h`` and others) are on this machine."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

# Layouts of NVIDIA's wheels in site-packages: CUDA 13, CUDA 12.
_WHEEL_FOLDERS = ("nvidia/cu13/include", "nvidia/cuda_runtime/include")
# Folders with nv/target: NVIDIA's CCCL wheels (13, 12), CuPy's bundled copy.
_TARGET_FOLDERS = ("nvidia/cu13/include/cccl", "nvidia/cuda_cccl/include", "cupy/_core/include/cupy/_cccl/libcudacxx")
# Those of another major version than the compiler's.
_FOREIGN = {12: ("nvidia/cu13",), 13: ("nvidia/cuda_cccl",)}


def _package_folders() -> list[Path]:
    """The folders that packages are imported from: site-packages, the user's own, and those in ``PYTHONPATH``."""
    return list(dict.fromkeys(Path(folder) for folder in sys.path if folder))


def _toolkits() -> list[Path]:
    """Roots of toolkits outside of Python; those that the user names come first."""
    found = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")]
    if conda := os.environ.get("CONDA_PREFIX"):
        found += [conda, f"{conda}/targets/x86_64-linux"]
    if compiler := shutil.which("nvcc"):
        found.append(str(Path(compiler).resolve().parents[1]))
    return [Path(toolkit) for toolkit in (*found, "/usr/local/cuda") if toolkit]


def version_of_headers(folder: Path) -> tuple[int, int] | None:
    """Version of CUDA that an include folder belongs to, by its ``cuda_runtime_api.h``; None if that is not there."""
    try:
        text = (folder / "cuda_runtime_api.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^#define\s+CUDART_VERSION\s+(\d+)", text, re.MULTILINE)
    return (int(found[1]) // 1000, int(found[1]) % 1000 // 10) if found else None


def cuda_header_folders(version: tuple[int, int] | None = None) -> list[Path]:
    """Include folders that hold ``cuda_fp16.h``, ``cuda_bf16.h`` and ``nv/target``.

    pip's wheels come first, then the toolkit in ``CUDA_PATH`` or ``CUDA_HOME``, then those of Conda, of the ``nvcc`` on
    the path, and ``/usr/local/cuda``. One environment may hold several versions of CUDA, such as PyTorch's and CuPy's.

    Parameters
    ----------
    version : tuple of two int, optional
        The compiler's version: its headers come first, then those of its major version, then others.

    Returns
    -------
    list of Path
        Empty if there are none.
    """
    packages = _package_folders()
    candidates = [package / folder for package in packages for folder in _WHEEL_FOLDERS]
    candidates += [toolkit / "include" for toolkit in _toolkits()]
    candidates = [folder for folder in candidates if (folder / "cuda_fp16.h").is_file()]
    if not candidates:
        return []
    # The order above decides between equals.
    folder = min(candidates, key=lambda candidate: _distance(candidate, version)) if version else candidates[0]
    wheels = [name for name in _TARGET_FOLDERS if version is None or not name.startswith(_FOREIGN.get(version[0], ()))]
    targets = [folder, folder / "cccl"] + [package / name for package in packages for name in wheels]
    found = next((target for target in targets if (target / "nv" / "target").is_file()), None)
    return [folder] if found in (None, folder) else [folder, found]


def _distance(folder: Path, version: tuple[int, int]) -> int:
    """0 for headers of this version, 1 for those of its major version, 2 for others."""
    found = version_of_headers(folder)
    if found == version:
        return 0
    return 1 if found is not None and found[0] == version[0] else 2
