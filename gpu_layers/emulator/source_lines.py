"""Names of source lines and shared arrays in the messages and counters of a compiled module."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SourceLine:
    """A line of a kernel, and the line that its code was inlined into.

    Attributes
    ----------
    file : str
        Name of the file, without its folder.
    line : int
    caller : str
        ``file:line`` of the outermost line it was inlined into, or "".
    """

    file: str
    line: int
    caller: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" (from {self.caller})" if self.caller else "")


@dataclass(frozen=True)
class SharedArray:
    """A static shared array: its name, and its place in the module's shared segment."""

    name: str
    offset: int
    size: int


def _output_of(tool: str, *arguments: str) -> str:
    path = shutil.which(tool)
    if path is None:  # both tools come with every g++
        return ""
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=False).stdout


class DebugInformation:
    """Reads a module's debug information with the tools that come with the compiler.

    Parameters
    ----------
    library : pathlib.Path
        The shared object.
    load_address : int
        Where it is in memory.
    hidden_folders : iterable of path
        Code in these (the emulator's headers, CUDA's) is named by the line that uses it.
    """

    def __init__(self, library: pathlib.Path, load_address: int, hidden_folders: Iterable[pathlib.Path]):
        self._library = library
        self._load_address = load_address
        self._hidden = tuple(str(folder) for folder in hidden_folders)
        self._lines: dict[int, SourceLine] = {}
        self._shared_arrays: tuple[SharedArray, ...] | None = None

    def lines(self, return_addresses: Iterable[int]) -> dict[int, SourceLine]:
        """The source line of each return address."""
        wanted = set(return_addresses)
        missing = sorted(wanted - self._lines.keys())
        if missing:
            # One byte back: a return address may already belong to the next line.
            offsets = [f"{address - self._load_address - 1:#x}" for address in missing]
            text = _output_of("addr2line", "-a", "-i", "-e", str(self._library), *offsets)
            answers = re.split(r"^0x[0-9a-f]+\n", text, flags=re.MULTILINE)[1:]
            for address, answer in zip(missing, answers, strict=False):
                self._lines[address] = self._choose(answer)
        return {address: self._lines.get(address, SourceLine("?", 0)) for address in wanted}

    def _choose(self, answer: str) -> SourceLine:
        frames = []
        for path, line in re.findall(r"^(.*?):(\d+)", answer, flags=re.MULTILINE):
            if not path.startswith(self._hidden) and not path.endswith(".cpp"):
                frames.append((pathlib.PurePath(path).name, int(line)))
        if not frames:
            return SourceLine("?", 0)
        (file, number), outermost = frames[0], frames[-1]
        return SourceLine(file, number, f"{outermost[0]}:{outermost[1]}" if outermost != frames[0] else "")

    def shared_arrays(self) -> tuple[SharedArray, ...]:
        """Every static shared array of the module."""
        if self._shared_arrays is None:
            found = {}
            for symbol in _output_of("readelf", "--symbols", "--wide", "--demangle", str(self._library)).splitlines():
                fields = symbol.split(maxsplit=7)
                if len(fields) == 8 and fields[3] == "TLS" and fields[6] != "UND" and int(fields[2], 0) > 0:
                    name = fields[7].split("::")[-1]
                    if name != "segment_anchor":
                        found[int(fields[1], 16)] = SharedArray(name, int(fields[1], 16), int(fields[2], 0))
            self._shared_arrays = tuple(found[offset] for offset in sorted(found))
        return self._shared_arrays


def resolve(message: str, debug: DebugInformation, label: Callable[[int], str]) -> str:
    """Fill in what a message leaves to Python: ``{file:...}``, ``{pc:...}``, ``{arg:...}``, ``{shared:...}``."""
    addresses = [int(text, 16) for text in re.findall(r"\{pc:(0x[0-9a-f]+)\}", message)]
    lines = debug.lines(addresses) if addresses else {}
    message = re.sub(r"\{pc:(0x[0-9a-f]+)\}", lambda m: str(lines[int(m[1], 16)]), message)
    message = re.sub(r"\{file:(.*?):(\d+)\}", lambda m: f"{pathlib.PurePath(m[1]).name}:{m[2]}", message)
    message = re.sub(r"\{arg:(\d+)\}", lambda m: label(int(m[1])), message)
    return re.sub(r"\{shared:(\d+)\}", lambda m: f"the shared array '{debug.shared_arrays()[int(m[1])].name}'", message)
