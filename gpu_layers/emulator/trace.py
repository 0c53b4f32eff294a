"""What a checked launch counted: the memory traffic that a GPU would see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

from .source_lines import SourceLine

#: The name of shared memory where an argument's name would stand.
SHARED = "shared"


@dataclass(frozen=True)
class Traffic:
    """Counts of memory accesses. A request is one instruction of one warp.

    Attributes
    ----------
    accesses : int
        One for each thread.
    bytes : int
        Moved by all threads together.
    requests : int
        One for each warp.
    sectors, lines : int
        32-byte sectors and 128-byte lines of global memory, distinct within each request.
    wavefronts : int
        Passes that the 32 banks of shared memory need.
    bank_conflicts : int
        Passes beyond those that the width of the access needs anyway.
    """

    accesses: int = 0
    bytes: int = 0
    requests: int = 0
    sectors: int = 0
    lines: int = 0
    wavefronts: int = 0
    bank_conflicts: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Traffic)))


@dataclass(frozen=True)
class LineTraffic:
    """What one source line did to one argument, or to shared memory.

    Attributes
    ----------
    place : SourceLine
    argument : str
        Name of the argument, or ``"shared"``.
    access : {"load", "store", "atomic"}
    width : int
        Bytes that each thread moves at once.
    traffic : Traffic
    """

    place: SourceLine
    argument: str
    access: str
    width: int
    traffic: Traffic


@dataclass(frozen=True)
class Footprint:
    """Distinct bytes (and 32-byte sectors) of one argument that a launch touched: what must cross the DRAM bus."""

    bytes_loaded: int = 0
    bytes_stored: int = 0
    sectors_loaded: int = 0
    sectors_stored: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Footprint)))


@dataclass(frozen=True)
class Trace:
    """The counters of one launch, or the sum of several.

    Attributes
    ----------
    kernels : tuple of str
        What was launched.
    lines : tuple of LineTraffic
    footprints : dict of str to Footprint
        By argument name. A sum adds them up: each launch reads its arrays anew.
    shared_bytes : int
        Static shared memory that a block uses.
    """

    kernels: tuple[str, ...] = ()
    lines: tuple[LineTraffic, ...] = ()
    footprints: dict[str, Footprint] = field(default_factory=dict)
    shared_bytes: int = 0

    def total(self, argument: str | None = None, access: str | None = None) -> Traffic:
        """Sum over the lines, of one argument and one kind of access if given.

        ``argument=None`` sums global memory; shared memory is the argument ``"shared"``.
        """
        result = Traffic()
        for line in self.lines:
            is_wanted = line.argument != SHARED if argument is None else line.argument == argument
            if is_wanted and (access is None or line.access == access):
                result = result + line.traffic
        return result

    def widths(self, argument: str | None = None, access: str | None = None) -> dict[int, int]:
        """How many thread accesses had which width, in bytes."""
        counts: dict[int, int] = defaultdict(int)
        for line in self.lines:
            is_wanted = line.argument != SHARED if argument is None else line.argument == argument
            if is_wanted and (access is None or line.access == access):
                counts[line.width] += line.traffic.accesses
        return dict(counts)

    @property
    def bytes_loaded(self) -> int:
        """Bytes of global memory that threads loaded."""
        return self.total(access="load").bytes

    @property
    def bytes_stored(self) -> int:
        """Bytes of global memory that threads stored."""
        return self.total(access="store").bytes

    @property
    def sectors(self) -> int:
        """32-byte sectors of global memory, summed over requests."""
        return self.total().sectors

    @property
    def bank_conflicts(self) -> int:
        """Extra passes over the banks of shared memory."""
        return self.total(SHARED).bank_conflicts

    @property
    def footprint(self) -> Footprint:
        """Distinct bytes of all arguments together."""
        return sum(self.footprints.values(), Footprint())

    def __add__(self, other: Trace) -> Trace:
        merged = {(line.place, line.argument, line.access, line.width): line for line in self.lines}
        for line in other.lines:
            key = (line.place, line.argument, line.access, line.width)
            known = merged.get(key)
            merged[key] = line if known is None else replace(known, traffic=known.traffic + line.traffic)
        footprints = dict(self.footprints)
        for name, footprint in other.footprints.items():
            footprints[name] = footprints.get(name, Footprint()) + footprint
        return Trace(
            self.kernels + other.kernels, tuple(merged.values()), footprints, max(self.shared_bytes, other.shared_bytes)
        )

    def table(self) -> str:
        """The lines as text, the busiest first."""
        rows: list[tuple[str, ...]] = [
            ("line", "argument", "access", "width", "requests", "bytes", "sectors", "lines", "conflicts")
        ]
        for line in sorted(self.lines, key=lambda item: -item.traffic.bytes):
            counts = line.traffic
            numbers = (line.width, counts.requests, counts.bytes, counts.sectors, counts.lines, counts.bank_conflicts)
            rows.append((str(line.place), line.argument, line.access, *map(str, numbers)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def merge(lines: Iterable[LineTraffic]) -> tuple[LineTraffic, ...]:
    """Lines of equal place, argument, access and width become one: copies that the compiler made of one source line."""
    return (Trace() + Trace(lines=tuple(lines))).lines
