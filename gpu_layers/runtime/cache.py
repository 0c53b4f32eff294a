"""The user's cache folder of compiled kernels."""

from __future__ import annotations

import glob
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Folder in it of what runs on GPUs.
CUBINS = "cubin"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class CacheContents:
    """What is in the cache folder.

    Attributes
    ----------
    folder : Path
    size : int
        Bytes of all files.
    kernels : int
        Files of compiled kernels for GPUs.
    """

    folder: Path
    size: int
    kernels: int


def cache_folder() -> Path:
    """``$GPU_LAYERS_CACHE_DIR``, else ``gpu_layers`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    chosen = os.environ.get("GPU_LAYERS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpu_layers"


def cache_contents() -> CacheContents:
    """What is in the cache folder now; nothing where there is none yet, or where it cannot be read."""
    folder = cache_folder()
    size = kernels = 0
    for place, _, names in os.walk(folder):
        for name in names:
            # Another process may have removed it since.
            with suppress(OSError):
                size += os.stat(os.path.join(place, name)).st_size
                kernels += place == str(folder / CUBINS) and name.endswith((".cubin", ".ptx"))
    return CacheContents(folder, size, kernels)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers, and a crash at any moment, see the old content or the new, nothing between.

    Parameters
    ----------
    path : Path
        Its folder is made if need be.
    content : bytes

    Raises
    ------
    OSError
        If it could not be written; an old file is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_PARTIAL}")
    try:
        # Not tempfile: its files are for their owner alone, and so would the result be.
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_partial(path: Path) -> None:
    """Remove what killed writes of this file left behind; not while another process may be writing it."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*{_PARTIAL}"):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the file system can: some refuse to synchronise folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
