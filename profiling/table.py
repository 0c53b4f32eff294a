"""Results as a text table."""

from __future__ import annotations

from profiling.implementations import COPY, PEERS
from profiling.results import Row, Run

_HEAD = {
    "measured": "Measured on {gpu}, driver {driver}, CUDA {cuda}, CuPy {cupy}, PyTorch {torch}, commit {commit}.",
    "emulated": "EMULATED on {cpu}: these times test the benchmark and say nothing of a GPU. Commit {commit}.",
    "modelled": "MODELLED, never run on a GPU: bytes counted by emulation, no times. Commit {commit}.",
}


def table(run: Run) -> str:
    """One line a case: time and spread, rate, fraction of the copy's, and the time of each peer over ours."""
    facts = {key: "-" if value is None else value for key, value in run.environment.items()}
    lines = [_HEAD[run.kind].format_map(_Dashes(facts))]
    if run.copy_gb_per_s:
        lines.append(f"A large copy from device to device: {run.copy_gb_per_s:,.0f} GB/s, read and written.")
    lines.append("Rates count floor bytes: each input once, each output once. Peers: their time over ours.")
    width = max([4, *(len(row.case) for row in run.rows)])
    names = [peer.name for peer in PEERS if peer.name != COPY]
    head = f"{'case':<{width}} {'us':>9} {'spread':>6} {'GB/s':>6} {'of copy':>7}"
    lines.append(head + "".join(f" {name:>13}" for name in names))
    lines += [_line(row, run.copy_gb_per_s, width, names) for row in run.rows]
    if run.left_off:
        lines.append(f"The time did not suffice for {len(run.left_off)} more: {run.left_off[0]}, ...")
    return "\n".join(lines)


def _line(row: Row, copy: float | None, width: int, names: list[str]) -> str:
    ours = row.timings.get("ours")
    cells = f"{row.case:<{width}} "
    if ours is None:
        return cells + "; ".join(row.notes)
    fraction = row.fraction(copy)
    cells += f"{ours.median:>9.1f} {ours.spread:>6.0%} {row.gb_per_s:>6.0f} "
    cells += f"{'-':>7}" if fraction is None else f"{fraction:>7.2f}"
    for name in names:
        ratio = row.ratio(name)
        cells += f" {'-':>13}" if ratio is None else f" {ratio:>12.2f}x"
    return f"{cells}  {'; '.join(row.notes)}".rstrip()


class _Dashes(dict):
    def __missing__(self, key: str) -> str:
        return "-"
