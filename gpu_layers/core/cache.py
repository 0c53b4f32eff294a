"""The user's cache folder of compiled kernels."""

from __future__ import annotations

import glob
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Its folder for kernels of GPUs.
CUBINS = "cubin"
_PARTIAL = ".partial"
_VARIABLE = "GPU_LAYERS_CACHE_DIR"


@dataclass(frozen=True)
class CacheContents:
    """Contents of the cache folder.

    Attributes
    ----------
    folder : Path
    size : int
        Size of all files in bytes.
    kernels : int
        Number of files of compiled kernels for GPUs.
    """

    folder: Path
    size: int
    kernels: int


def cache_folder() -> Path:
    """``$GPU_LAYERS_CACHE_DIR``, else ``gpu_layers`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.

    Raises
    ------
    RuntimeError
        If there is no home folder for it, or the user of a ``~`` does not exist.
    """
    chosen, base = (os.environ.get(name) for name in (_VARIABLE, "XDG_CACHE_HOME"))
    try:
        # In GPU_LAYERS_CACHE_DIR="~/x", or in a file of settings, the shell leaves the ~.
        if chosen:
            return Path(chosen).expanduser()
        return Path(base or "~/.cache").expanduser() / "gpu_layers"
    except RuntimeError as error:
        raise RuntimeError(f"no folder for compiled kernels ({error}): set {_VARIABLE} to one") from error


def writable_cache_folder(name: str) -> Path:
    """A folder in the cache folder, made if it is missing.

    Parameters
    ----------
    name : str

    Returns
    -------
    Path

    Raises
    ------
    RuntimeError
        If it cannot be made or written to; the message names the variable for another one.
    """
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "it cannot be written to"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise RuntimeError(f"compiled kernels cannot be kept in {folder} ({reason}): set {_VARIABLE} to another folder")
    return folder


def cache_contents() -> CacheContents:
    """Current contents of the cache folder; nothing if it does not exist or cannot be read."""
    folder = cache_folder()
    size = kernels = 0
    for place, _, names in os.walk(folder):
        for name in names:
            # Another process may have removed it.
            with suppress(OSError):
                size += Path(place, name).stat().st_size
                kernels += place == str(folder / CUBINS) and name.endswith((".cubin", ".ptx"))
    return CacheContents(folder, size, kernels)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see either the old or the new content, also after a crash at any moment.

    Parameters
    ----------
    path : Path
        Its folder is made if it is missing.
    content : bytes

    Raises
    ------
    OSError
        If it could not be written; an old file then stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_PARTIAL}")
    try:
        # Not tempfile: only the owner may read its files, and so the result.
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_partial(path: Path) -> None:
    """Remove the remains of killed writes of this file. Not while another process may be writing it."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.*{_PARTIAL}"):
        leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, if the file system can: some refuse to synchronise folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
