"""Compiling a ``.cu`` file for the host, once: finished modules are kept in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from . import toolchain
from .errors import CacheError, CompilationError

HOST_FOLDER = pathlib.Path(__file__).parent / "host"

#: The CUDA headers include these two by path; some wheels lack them, so ours are always used.
_FORWARDED_HEADERS = {"crt/host_defines.h": "cuda_host_defines.h", "nv/target": "nv_target.h"}

#: A part of every kernel file is compiled again for each process that shares the work, so splitting
#: pays only for many kernels.
_KERNELS_PER_PART = 12

#: Included before every kernel file; precompiled, as it takes longer to read than most of them.
_PREAMBLE = "preamble.h"
_PREAMBLE_HEADERS = ("emulated_cuda.h", "kernel_entry.h")

_MAX_ERROR_LINES = 30
_SOURCE_SUFFIXES = (".cu", ".cuh", ".h", ".hpp", ".cpp")

#: Parts of the runtime that are empty in every other mode.
_CHECKED_SOURCES = ("checker.cpp", "happens_before.cpp", "memory_map.cpp", "shadow_memory.cpp", "traffic.cpp")


#: Names of folders that are being built begin so.
_SCRATCH = "building-"
#: The last file of a build: size and SHA-256 of each of the others.
_MANIFEST = "manifest.json"


def _folder_state(folder: pathlib.Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of each source in a folder; it reads none of them."""
    with os.scandir(folder) as entries:
        sources = [entry for entry in entries if entry.name.endswith(_SOURCE_SUFFIXES) and entry.is_file()]
        return tuple(sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in sources))


@functools.lru_cache(maxsize=64)
def _folder_digest(folder: pathlib.Path, state: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, size, _ in state:
        digest.update(f"\0{name}\0{size}\0".encode())
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _digest(parts: Sequence[str], folders: Sequence[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    for folder in folders:
        digest.update(_folder_digest(folder, _folder_state(folder)).encode())
    return digest.hexdigest()[:40]


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_manifest(folder: pathlib.Path) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    entries = {str(path.relative_to(folder)): [path.stat().st_size, _sha256(path)] for path in files}
    (folder / _MANIFEST).write_text(json.dumps(entries, indent=1))


def is_whole(folder: pathlib.Path, *, to_the_byte: bool = True) -> bool:
    """Whether every file of a finished build is as it was written, or at least has its size."""
    try:
        entries = json.loads((folder / _MANIFEST).read_text())
        return all(
            (folder / name).stat().st_size == size and (not to_the_byte or _sha256(folder / name) == digest)
            for name, (size, digest) in entries.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):  # a damaged manifest
        return False


def mark_damaged(folder: pathlib.Path) -> None:
    """Make the next :func:`build` replace a finished build."""
    (folder / _MANIFEST).unlink(missing_ok=True)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _lock_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f"{name}.lock"


def _remove_killed_builds(folder: pathlib.Path) -> None:
    """Remove scratch folders whose builder has ended: a running builder holds the lock of its target."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        name, _, _ = scratch.name.removeprefix(_SCRATCH).rpartition(".")
        lock = _lock_file(folder, name)
        if name and lock.exists():
            with lock.open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:  # it is being built
                    continue
                _remove(scratch)
        else:
            _remove(scratch)


def _make_writable(folder: pathlib.Path) -> None:
    """Make a folder if it is missing; CacheError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "it cannot be written to"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise CacheError(f"compiled kernels cannot be kept in {folder} ({reason})")


@contextlib.contextmanager
def _building(target: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """A scratch folder that becomes ``target`` when the block succeeds; None if another process was first.

    The lock only saves work; the atomic rename makes two builds safe. A damaged target is replaced.
    """
    folder = target.parent
    _make_writable(folder)
    _remove_killed_builds(folder)
    with _lock_file(folder, target.name).open("w") as lock:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if is_whole(target):
            yield None
            return
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{target.name}.", dir=folder))
        try:
            yield scratch
            _write_manifest(scratch)
            if target.exists() or target.is_symlink():
                damaged = scratch.with_name(f"{scratch.name}-damaged")
                with contextlib.suppress(OSError):  # a process without our lock was faster
                    target.rename(damaged)
                _remove(damaged)
            with contextlib.suppress(OSError):  # a process without our lock was faster
                scratch.rename(target)
        finally:
            _remove(scratch)


def _run(command: Sequence[str], what: str) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = finished.stderr.splitlines()
        shown = "\n".join(lines[:_MAX_ERROR_LINES])
        more = f"\n... and {len(lines) - _MAX_ERROR_LINES} more lines" if len(lines) > _MAX_ERROR_LINES else ""
        raise CompilationError(f"{what} does not compile for the emulated backend:\n{shown}{more}")


def _run_all(commands: Sequence[Sequence[str]], what: str) -> None:
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(lambda command: _run(command, what), commands))


def _write_forwarding_headers(folder: pathlib.Path) -> None:
    for name, target in _FORWARDED_HEADERS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#include "{HOST_FOLDER / target}"\n')


def _runtime_objects(
    compiler: toolchain.Compiler, flags: Sequence[str], headers: pathlib.Path, mode: str, cache: pathlib.Path
) -> pathlib.Path:
    """The folder that all modules of a mode share: the compiled runtime and the preamble."""
    module_flags = flags
    flags = [flag for flag in flags if not flag.startswith("-g")]  # not debugged, and it doubles the time
    if mode == "trace":  # the runtime does not watch itself, and does most of the work
        flags = [flag for flag in flags if flag != "-fsanitize=thread"] + ["-O2"]
    key = _digest(
        [
            "runtime",
            compiler.version,
            *compiler.command[1:],
            *module_flags,
            *flags,
            str(HOST_FOLDER),
            toolchain.headers_digest(headers),
        ],
        [HOST_FOLDER],
    )
    target = cache / f"runtime-{key}"
    if not is_whole(target):
        with _building(target) as scratch:
            if scratch is not None:
                _write_forwarding_headers(scratch)
                include = [f"-I{HOST_FOLDER}", f"-I{scratch}", "-isystem", str(headers)]
                commands = [
                    [*compiler.command, *flags, *include, "-c", str(source), "-o", f"{scratch / source.stem}.o"]
                    for source in sorted(HOST_FOLDER.glob("*.cpp"))
                    if mode == "trace" or source.name not in _CHECKED_SOURCES
                ]
                preamble = scratch / _PREAMBLE
                preamble.write_text("".join(f'#include "{HOST_FOLDER / name}"\n' for name in _PREAMBLE_HEADERS))
                if compiler.is_gcc:
                    precompile = [*compiler.command, *module_flags, *include, "-x", "c++-header", str(preamble)]
                    commands.append([*precompile, "-o", f"{preamble}.gch"])
                _run_all(commands, "the emulator's runtime")
    return target


def _wrapper(source: pathlib.Path, names: Sequence[tuple[int, str]]) -> str:
    lines = [f'#include "{source}"']
    lines += [f"GPU_LAYERS_EMULATED_KERNEL({index}, {name})" for index, name in names]
    return "\n".join(lines) + "\n"


def _with_red_zones(assembly: str) -> str:
    """Leave a gap after each static shared array, so that an overrun hits no other array."""
    lines = assembly.split("\n")
    in_shared_segment = False
    for i, line in enumerate(lines):
        words = line.split()
        if words and words[0] in (".section", ".text", ".data", ".bss"):
            in_shared_segment = words[0] == ".section" and words[1].startswith((".tbss", ".tdata"))
        elif in_shared_segment and words and words[0] == ".zero":
            lines[i] = f"\t.zero\t{int(words[1]) + 64}"
    return "\n".join(lines)


def _compile_part(compiler: toolchain.Compiler, flags: Sequence[str], part: pathlib.Path, what: str, mode: str) -> None:
    if mode != "trace":
        _run([*compiler.command, *flags, "-c", str(part), "-o", str(part.with_suffix(".o"))], what)
        return
    assembly = part.with_suffix(".s")
    _run([*compiler.command, *flags, "-S", str(part), "-o", str(assembly)], what)
    assembly.write_text(_with_red_zones(assembly.read_text()))
    _run([*compiler.command, "-c", str(assembly), "-o", str(part.with_suffix(".o"))], what)


def build(
    source: pathlib.Path,
    names: Sequence[str],
    include_dirs: Sequence[pathlib.Path],
    mode: str,
    *,
    cache: pathlib.Path,
    headers: pathlib.Path,
) -> pathlib.Path:
    """Compile ``source`` with these kernels, or find it compiled in ``cache``; return the shared object.

    ``headers`` is a folder with ``cuda_fp16.h``.
    """
    compiler = toolchain.find_compiler()
    flags = toolchain.compile_flags(mode, compiler)
    folders = [source.parent, *include_dirs]
    key = _digest(
        [
            "module",
            compiler.version,
            *compiler.command[1:],
            *flags,
            *map(str, folders),
            str(source),
            toolchain.headers_digest(headers),
            *names,
        ],
        [HOST_FOLDER, *folders],
    )
    target = cache / f"{source.stem}-{mode}-{key}"
    if not is_whole(target, to_the_byte=False):
        runtime = _runtime_objects(compiler, flags, headers, mode, cache)
        with _building(target) as scratch:
            if scratch is not None:
                _build_module(compiler, flags, headers, runtime, source, names, folders, mode, scratch)
    return target / "module.so"


def _build_module(
    compiler: toolchain.Compiler,
    flags: Sequence[str],
    headers: pathlib.Path,
    runtime: pathlib.Path,
    source: pathlib.Path,
    names: Sequence[str],
    folders: Sequence[pathlib.Path],
    mode: str,
    scratch: pathlib.Path,
) -> None:
    include = [f"-I{HOST_FOLDER}", f"-I{runtime}", *(f"-I{folder}" for folder in folders), "-isystem", str(headers)]
    flags = [*flags, *include, "-include", str(runtime / _PREAMBLE)]
    numbered = list(enumerate(names))
    part_count = max(1, min(os.cpu_count() or 1, len(numbered) // _KERNELS_PER_PART))
    parts = []
    for i in range(part_count):
        part = scratch / f"part_{i}.cpp"
        part.write_text(_wrapper(source, numbered[i::part_count]))
        parts.append(part)
    with ThreadPoolExecutor(max_workers=part_count) as pool:
        list(pool.map(lambda part: _compile_part(compiler, flags, part, str(source), mode), parts))
    link_flags = [flag for flag in flags if flag.startswith("-fsanitize") and flag != "-fsanitize=thread"]
    _run(
        [
            *compiler.command,
            "-shared",
            "-Wl,-z,muldefs",  # a plain function of the .cu file is in every part
            *link_flags,
            "-o",
            str(scratch / "module.so"),
            *(str(part.with_suffix(".o")) for part in parts),
            *(str(path) for path in sorted(runtime.glob("*.o"))),
        ],
        str(source),
    )
    for part in parts:
        for leftover in (part.with_suffix(".o"), part.with_suffix(".s")):
            leftover.unlink(missing_ok=True)
