"""The folder of the CUDA sources, and a digest of their content."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def source_folder() -> Path:
    """Folder of the ``.cu`` files: inside an installed package, beside it in a checkout.

    Raises
    ------
    RuntimeError
        If neither holds them: the installation is broken.
    """
    package = Path(__file__).resolve().parent.parent
    candidates = (package / "cuda_src", package.parent / "cuda_src")
    for folder in candidates:
        if (folder / "philox.cuh").is_file():
            return folder
    raise RuntimeError(
        "the CUDA sources of gpu_layers were not found in "
        + " or ".join(str(folder) for folder in candidates)
        + "; reinstall the package"
    )


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """SHA-256 over the names and contents of all CUDA sources."""
    digest = hashlib.sha256()
    for path in sorted(source_folder().glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
