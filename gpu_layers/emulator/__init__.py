"""Runs the project's ``.cu`` files on the CPU: every CUDA thread is a fibre, and no GPU is needed."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Sequence

from .build import HOST_FOLDER, build, is_whole, mark_damaged
from .errors import EmulationError
from .module import EmulatedModule
from .sanitizers import check_environment, sanitizer_environment
from .schedule import ALL_SCHEDULES, Schedule
from .toolchain import find_cuda_headers
from .trace import Trace

__all__ = ["ALL_SCHEDULES", "EmulatedModule", "EmulationError", "Schedule", "Trace", "load", "sanitizer_environment"]


class _DamagedModuleError(Exception):
    """A module in the cache is damaged."""


@functools.lru_cache(maxsize=256)
def _open(source: pathlib.Path, names: tuple[str, ...], mode: str, library: pathlib.Path) -> EmulatedModule:
    if not is_whole(library.parent):  # the loader would map whatever is in it
        raise _DamagedModuleError
    try:
        return EmulatedModule(source, names, mode, library, [HOST_FOLDER, find_cuda_headers()])
    except OSError as error:
        raise EmulationError(
            f"the compiled module does not load ({error}): where files of the cache folder may not be executed, set "
            "GPU_LAYERS_CACHE_DIR to another"
        ) from error


def load(
    source: pathlib.Path | str,
    names: Sequence[str],
    *,
    include_dirs: Iterable[pathlib.Path | str] = (),
    mode: str = "fast",
) -> EmulatedModule:
    """Compile kernels of a ``.cu`` file for the CPU.

    Parameters
    ----------
    source : path
        The file. Its folder is searched for headers.
    names : sequence of str
        C++ name expressions, e.g. ``dropout_forward<float, 8>``.
    include_dirs : iterable of path, optional
        More folders to search for headers.
    mode : {"fast", "trace", "asan", "ubsan"}
        "trace" checks and counts every memory access. "asan" and "ubsan" need a process started with
        :func:`sanitizer_environment`.

    Returns
    -------
    EmulatedModule

    Raises
    ------
    EmulationError
        Without a compiler or CUDA headers, or if the file does not compile or load.
    RuntimeError
        If there is no cache folder that can be written to.
    """
    path = pathlib.Path(source).resolve(strict=True)
    check_environment(mode)
    folders = [pathlib.Path(folder).resolve() for folder in include_dirs]
    library = build(path, list(names), folders, mode)
    try:
        return _open(path, tuple(names), mode, library)
    except _DamagedModuleError:
        mark_damaged(library.parent)
    return _open(path, tuple(names), mode, build(path, list(names), folders, mode))
