"""How many bytes the kernels move, counted by the emulator over whole launches, against the fewest possible.

The floors are those of the catalogue. Of batch norm in training, which must know the statistics before it can
normalise, each input is read twice where its plan says that the values cannot be kept.

What is counted is the distinct 32-byte sectors that each launch touches: what the DRAM moves, as long as the caches
hold what neighbouring threads share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass

from gpu_layers.catalogue import TrafficCase, traffic_cases
from gpu_layers.catalogue.traffic import SECTOR
from gpu_layers.emulator import Trace
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.kernel import Kernel
from gpu_layers.verification.selection import named_like


@dataclass(frozen=True)
class TrafficRow:
    """What one pass moved.

    Attributes
    ----------
    case : TrafficCase
    launches : int
    floor, moved : int
        Bytes: the fewest possible; of the distinct sectors of each launch.
    sectors : int
        Sectors that warps asked for, one by one.
    widest : float
        Part of the bytes that was asked for 16 at a time.
    bank_conflicts : int
        Extra passes over the banks of shared memory.
    saved : int
        Of a forward: bytes of the arrays that it keeps for the backward.
    trace : Trace
        The same by source line.
    """

    case: TrafficCase
    launches: int
    floor: int
    moved: int
    sectors: int
    widest: float
    bank_conflicts: int
    saved: int
    trace: Trace

    @property
    def ratio(self) -> float:
        """Bytes moved, as a multiple of the floor."""
        return self.moved / self.floor

    @property
    def is_good(self) -> bool:
        """Whether it is within the limit."""
        return self.ratio <= self.case.limit


def _saved_bytes(saved: object) -> int:
    """Bytes of the arrays among the fields of what a forward saved."""
    if not is_dataclass(saved):
        return 0
    return sum(getattr(getattr(saved, field.name), "nbytes", 0) for field in fields(saved))


def count(case: TrafficCase) -> TrafficRow:
    """Run a pass emulated in checked mode, and add up what its launches moved."""
    with use_backend("reference"):
        measured, floor = case.prepare()
    traces: list[Trace] = []

    def record(kernel: Kernel, trace: Trace) -> None:
        traces.append(trace)

    with use_backend("emulated", check=True, record=record):
        result = measured()
    total = sum(traces, Trace())
    footprint = total.footprint
    asked, widths = total.total(), total.widths()
    return TrafficRow(
        case=case,
        launches=len(traces),
        floor=floor,
        moved=(footprint.sectors_loaded + footprint.sectors_stored) * SECTOR,
        sectors=asked.sectors,
        widest=16 * widths.get(16, 0) / max(asked.bytes, 1),
        bank_conflicts=total.bank_conflicts,
        saved=_saved_bytes(result[1]) if isinstance(result, tuple) else 0,
        trace=total,
    )


def count_all(
    only: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[TrafficRow]:
    """:func:`count` for all cases, or those whose name a regular expression finds.

    Raises
    ------
    ValueError
        If ``only`` is not a regular expression, or finds no case.
    """
    cases = named_like(traffic_cases(), only)
    rows = []
    for done, case in enumerate(cases, 1):
        rows.append(count(case))
        progress(done, len(cases))
    return rows


def traffic_table(rows: list[TrafficRow]) -> str:
    """The rows as aligned text."""
    lines = [
        f"{'pass':<35}{'dtype':<10}{'layout':<8}{'shape':<16}{'launches':>8}{'floor':>12}{'moved':>12}"
        f"{'ratio':>8}{'limit':>7}{'asked':>8}{'by 16':>7}{'bank':>6}{'keeps':>11}{'torch':>11}"
    ]
    for row in rows:
        case = row.case
        lines.append(
            f"{case.op:<35}{case.dtype!s:<10}{case.layout:<8}{'x'.join(map(str, case.shape)):<16}{row.launches:>8}"
            f"{row.floor:>12,}{row.moved:>12,}{row.ratio:>8.3f}{case.limit:>7.2f}"
            f"{row.sectors * SECTOR / row.floor:>8.2f}{row.widest:>7.0%}{row.bank_conflicts:>6}"
            f"{'' if case.torch_saved is None else f'{row.saved:>11,}{case.torch_saved:>11,}'}"
            f"{'' if row.is_good else '  OVER THE LIMIT'}"
        )
    lines += [
        "",
        "floor, moved: bytes, the fewest possible and those of the distinct 32-byte sectors of each launch; ratio:",
        "moved over the floor; asked: sectors that warps asked for, over the floor; caches absorb what is above 1;",
        "by 16: part of the bytes asked for in 16-byte accesses; bank: conflicts in shared memory; keeps, torch:",
        "bytes that a pooling keeps for its backward, and those that PyTorch's keeps alive, of its input too.",
        "Counted, not timed.",
    ]
    return "\n".join(lines)
