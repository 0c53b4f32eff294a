"""What became faster or slower between two runs, beyond noise."""

from __future__ import annotations

from profiling.results import ResultsError, Run
from profiling.statistics import verdict

_OURS = "ours"


def compare(old: Run, new: Run) -> str:
    """A table of the cases of both runs whose time changed, and how many did not.

    Raises
    ------
    ResultsError
        If the runs are of different kinds: an emulated time says nothing of a measured one.
    """
    if old.kind != new.kind:
        raise ResultsError(f"results that are {new.kind} cannot be compared with those that are {old.kind}")
    before = {row.case: row for row in old.rows}
    lines, same, alone = [], 0, 0
    for row in new.rows:
        earlier = before.get(row.case)
        if earlier is None or earlier.shape != row.shape or _OURS not in row.timings or _OURS not in earlier.timings:
            alone += 1
            continue
        was, now = earlier.timings[_OURS], row.timings[_OURS]
        found = verdict(was, now)
        if found == "same":
            same += 1
            continue
        change = now.median / was.median - 1
        lines.append(f"{found:<7} {row.case:<62} {was.median:>10.1f} us -> {now.median:>9.1f} us  {change:+.0%}")
    lines.sort()
    gpus = [str(run.environment.get("gpu", run.kind)) for run in (old, new)]
    head = f"{old.environment.get('commit')} ({gpus[0]}) -> {new.environment.get('commit')} ({gpus[1]})"
    summary = f"{len(lines)} changed beyond noise, {same} did not, {alone} in one run only"
    return "\n".join([head, *lines, summary])
