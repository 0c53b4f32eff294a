"""Running the verification, and its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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
        Largest error, as a part of what is allowed; 0 where all bits are equal.
    failures : list of str
        A message a wrong result.
    """

    op: str
    dtype: str
    cases: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)


def verify(
    backend: Backend, only: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Row]:
    """Compare a backend with the reference.

    Parameters
    ----------
    backend : Backend
    only : str, optional
        Regular expression; cases whose name it does not find are left out.
    progress : callable
        Takes the number of cases done, and of all.

    Returns
    -------
    list of Row

    Raises
    ------
    ValueError
        If ``only`` is no regular expression, or finds no case.
    """
    cases = named_like(all_cases(), only)
    rows: dict[tuple[str, str], Row] = {}
    for done, case in enumerate(cases, 1):
        row = rows.setdefault((case.op, str(case.dtype)), Row(case.op, str(case.dtype)))
        row.cases += 1
        for difference in differences(case, backend):
            row.worst = max(row.worst, difference.ratio)
            if difference.ratio > 1:
                row.failures.append(f"{case}: {difference.message}")
        progress(done, len(cases))
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """The rows as aligned text, one an operation and dtype."""
    lines = [f"{'operation':<20}{'dtype':<10}{'cases':>6}  {'largest error':<28}result"]
    for row in rows:
        error = "none: equal bits" if row.worst == 0 else f"{row.worst:.0%} of what is allowed"
        result = "ok" if not row.failures else f"{len(row.failures)} WRONG"
        lines.append(f"{row.op:<20}{row.dtype:<10}{row.cases:>6}  {error:<28}{result}")
    return "\n".join(lines)
