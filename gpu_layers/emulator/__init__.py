"""Runs ``.cu`` files on the CPU: every CUDA thread is a fibre, and no GPU is needed; see its README.md."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterable, Sequence

from . import defaults
from .build import HOST_FOLDER, build, is_whole, mark_damaged
from .errors import CacheError, EmulationError
from .module import EmulatedModule
from .sanitizers import check_environment, sanitizer_environment
from .schedule import ALL_SCHEDULES, Schedule
from .trace import Trace

__all__ = ["ALL_SCHEDULES", "EmulatedModule", "EmulationError", "Schedule", "Trace", "load", "sanitizer_environment"]


class _DamagedModuleError(Exception):
    """A module in the cache is damaged."""


@functools.lru_cache(maxsize=256)
def _open(
    source: pathlib.Path, names: tuple[str, ...], mode: str, library: pathlib.Path, headers: pathlib.Path
) -> EmulatedModule:
    if not is_whole(library.parent):  # the loader would map whatever is in it
        raise _DamagedModuleError
    try:
        return EmulatedModule(source, names, mode, library, [HOST_FOLDER, headers])
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
    cache_dir: pathlib.Path | str | None = None,
    header_dir: pathlib.Path | str | None = None,
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
    cache_dir : path, optional
        Where compiled modules are kept; by default in the cache folder of gpu_layers.
    header_dir : path, optional
        A folder with ``cuda_fp16.h`` and the headers beside it; by default that of a pip wheel or a toolkit.

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
    cache = defaults.modules_folder() if cache_dir is None else pathlib.Path(cache_dir).resolve()
    headers = defaults.cuda_headers() if header_dir is None else pathlib.Path(header_dir).resolve()

    def built() -> pathlib.Path:
        try:
            return build(path, list(names), folders, mode, cache=cache, headers=headers)
        except CacheError as error:
            if cache_dir is not None:
                raise
            raise RuntimeError(f"{error}: {defaults.ADVICE}") from error

    library = built()
    try:
        return _open(path, tuple(names), mode, library, headers)
    except _DamagedModuleError:
        mark_damaged(library.parent)
    return _open(path, tuple(names), mode, built(), headers)
