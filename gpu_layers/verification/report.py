"""Running the verification, and its table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from gpu_layers.emulator.errors import ToolchainError
from gpu_layers.verification import Backend, all_cases, differences
from gpu_layers.verification.selection import named_like


@dataclass
class Row:
    """What was found for one operation and dtype.

    Attributes
    ----------
    op, dtype : str
    cases : int
    worst : float
        Largest error, as a part of the allowed error; 0 if all bits are equal.
    failures : list of str
        A message a wrong result, or a case that raised an error.
    """

    op: str
    dtype: str
    cases: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)


class DeviceLostError(RuntimeError):
    """The device does no more work; says from which case on.

    Attributes
    ----------
    rows : list of Row
        What was found before, and for that case.
    """

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


def verify(
    backend: Backend,
    only: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Compare a backend with the reference. A case that raises an error is a failure, and the others are run.

    Parameters
    ----------
    backend : Backend
    only : str, optional
        Regular expression; cases whose name it does not find are left out.
    progress : callable
        Takes the number of cases done, and of all.
    report : callable
        Called with the message of each failure, as soon as it is known.

    Returns
    -------
    list of Row

    Raises
    ------
    ValueError
        If ``only`` is not a regular expression, or finds no case.
    ToolchainError
        If what the emulated backend compiles with is missing.
    DeviceLostError
        If the device does no more work after a case.
    """
    cases = named_like(all_cases(), only)
    rows: dict[tuple[str, str], Row] = {}
    for done, case in enumerate(cases, 1):
        row = rows.setdefault((case.op, str(case.dtype)), Row(case.op, str(case.dtype)))
        row.cases += 1
        before = len(row.failures)
        lost = False
        try:
            for difference in differences(case, backend):
                row.worst = max(row.worst, difference.ratio)
                if difference.ratio > 1:
                    row.failures.append(f"{case}: {difference.message}")
        except ToolchainError:  # nothing can run here
            raise
        except Exception as error:  # an exception of a case is a result: it is reported, and the others run
            row.worst = math.inf
            row.failures.append(f"{case}: {type(error).__name__}: {' '.join(str(error).split())}")
            lost = backend.is_lost()
        for message in row.failures[before:]:
            report(message)
        if lost:
            raise DeviceLostError(
                f"the device stopped responding after case {case} ({done} of {len(cases)})", list(rows.values())
            )
        progress(done, len(cases))
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """The rows as aligned text, one per operation and dtype."""
    width = max(len(name) for name in ("operation", *(row.op for row in rows))) + 1
    lines = [f"{'operation':<{width}}{'dtype':<10}{'cases':>6}  {'largest error':<28}result"]
    for row in rows:
        error = "none: equal bits" if row.worst == 0 else f"{row.worst:.0%} of what is allowed"
        if math.isinf(row.worst):
            error = "beyond any bound"
        result = "ok" if not row.failures else f"{len(row.failures)} WRONG"
        lines.append(f"{row.op:<{width}}{row.dtype:<10}{row.cases:>6}  {error:<28}{result}")
    return "\n".join(lines)
