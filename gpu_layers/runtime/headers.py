"""Where the CUDA headers (``cuda_fp16.h`` and others) are on this machine."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

# Layouts of NVIDIA's wheels in site-packages: CUDA 13, CUDA 12.
_WHEEL_FOLDERS = ("nvidia/cu13/include", "nvidia/cuda_runtime/include")
# Who brings nv/target: NVIDIA's CCCL wheels (13, 12), CuPy's bundled copy.
_TARGET_FOLDERS = (
    "nvidia/cu13/include/cccl",
    "nvidia/cuda_cccl/include",
    "cupy/_core/include/cupy/_cccl/libcudacxx",
)


def _site_packages() -> list[Path]:
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]) for name in ("purelib", "platlib")))


def cuda_header_folders() -> list[Path]:
    """Include folders that hold ``cuda_fp16.h``, ``cuda_bf16.h`` and ``nv/target``.

    pip's wheels first, then the toolkit that ``CUDA_PATH`` or ``CUDA_HOME`` names, then ``/usr/local/cuda``.

    Returns
    -------
    list of Path
        Empty where there are none.
    """
    candidates = [site / folder for site in _site_packages() for folder in _WHEEL_FOLDERS]
    toolkits = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")] + ["/usr/local/cuda"]
    candidates += [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    for folder in candidates:
        if (folder / "cuda_fp16.h").is_file():
            break
    else:
        return []
    targets = [folder, folder / "cccl"] + [site / name for site in _site_packages() for name in _TARGET_FOLDERS]
    found = next((target for target in targets if (target / "nv" / "target").is_file()), None)
    return [folder] if found in (None, folder) else [folder, found]
