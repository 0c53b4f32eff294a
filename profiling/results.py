"""A run of the benchmark, or of the model of cost, as JSON and CSV: both have one shape. As text, and two compared."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from profiling.cases import Case
from profiling.implementations import COPY, PEERS
from profiling.timing import Timing, verdict

#: Raised whenever the meaning of a field changes.
SCHEMA = 2
KINDS = ("measured", "emulated", "modelled")
_OURS, _COPY = "ours", "copy"


class ResultsError(ValueError):
    """A file is no result, or one of another version."""


@dataclass
class Row:
    """One case.

    Attributes
    ----------
    case : str
        Its name: the key by which runs are compared.
    op, direction, dtype : str
    shape, asked : list of int
        (N, C, *spatial); ``asked`` is the shape of the reference list where memory was too small for it.
    channels_last : bool
    floor_bytes, torch_bytes : int
        The least that must be moved, and what PyTorch's own kernels move.
    correct : bool or None
        Whether ours agrees with the reference in float64; it is not timed otherwise. None for modelled rows.
    error : float or None
        Largest error as a part of what rounding allows.
    timings : dict of str to Timing
        Of each implementation.
    missing : dict of str to str
        Why an implementation has no timing.
    notes : list of str
        What a reader must know.
    model : dict or None
        Of the modelled run: ``gpu``, ``bytes``, ``instructions``, ``microseconds``, ``fraction`` of a copy, ``limit``,
        ``launches``, ``failed_gates``.
    """

    case: str
    op: str
    direction: str
    dtype: str
    shape: list[int]
    channels_last: bool
    floor_bytes: int
    torch_bytes: int
    asked: list[int] | None = None
    correct: bool | None = None
    error: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    model: dict[str, Any] | None = None

    @classmethod
    def of(cls, case: Case, **known: Any) -> Row:
        """The row of a case, and what is known of it."""
        return cls(
            case=str(case),
            op=case.operation.name,
            direction=case.direction,
            dtype=case.dtype,
            shape=list(case.shape),
            channels_last=case.channels_last,
            floor_bytes=case.floor_bytes,
            torch_bytes=case.torch_bytes,
            asked=list(case.asked) if case.asked else None,
            **known,
        )

    @property
    def gb_per_s(self) -> float | None:
        """Floor bytes over our time."""
        return self.rate(_OURS)

    def rate(self, implementation: str) -> float | None:
        """Floor bytes over an implementation's time, in GB/s."""
        timing = self.timings.get(implementation)
        return None if timing is None or not timing.median else self.floor_bytes / timing.median / 1e3

    def fraction(self, copy_gb_per_s: float | None) -> float | None:
        """Our rate, as a part of a large copy's in the same run: 1 is the floor."""
        rate = self.gb_per_s
        return None if rate is None or not copy_gb_per_s else rate / copy_gb_per_s

    def ratio(self, peer: str) -> float | None:
        """A peer's time over ours: above 1 ours is faster."""
        ours, theirs = self.timings.get(_OURS), self.timings.get(peer)
        return None if ours is None or theirs is None or not ours.median else theirs.median / ours.median


@dataclass
class Run:
    """All rows of a run, and where it took place.

    Attributes
    ----------
    kind : {"measured", "emulated", "modelled"}
        Only measured times are times of a GPU.
    environment : dict
    copy_gb_per_s : float or None
        What a large copy from device to device reached in this run, bytes read and written.
    rows : list of Row
    overhead : list of dict
        Host microseconds of a call on tiny arrays.
    left_off : list of str
        Cases that the time did not suffice for.
    schema : int
    """

    kind: str
    environment: dict[str, Any]
    copy_gb_per_s: float | None = None
    rows: list[Row] = field(default_factory=list)
    overhead: list[dict[str, Any]] = field(default_factory=list)
    left_off: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def put(self, row: Row) -> None:
        """Add a row, in the place of an older one of the same case; peers that were not timed again stay."""
        for number, older in enumerate(self.rows):
            if older.case == row.case:
                if row.timings and older.asked == row.asked:
                    row.timings = {**older.timings, **row.timings}
                self.rows[number] = row
                return
        self.rows.append(row)

    def save(self, path: Path | str) -> None:
        """Write JSON, all or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(self._json(), encoding="utf-8")
        partial.replace(path)

    def _json(self) -> str:
        """A line a row."""
        data = asdict(self)
        rows = ",\n".join(json.dumps(row) for row in data.pop("rows"))
        return f'{json.dumps(data)[:-1]}, "rows": [\n{rows}\n]}}\n'

    @staticmethod
    def load(path: Path | str) -> Run:
        """Read JSON.

        Raises
        ------
        ResultsError
            If there is no such file, it is no result, or one of another version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ResultsError(f"{path} is no result of a benchmark: {error}") from error
        if not isinstance(data, dict) or "schema" not in data:
            raise ResultsError(f"{path} is no result of a benchmark: it has no 'schema'")
        if data["schema"] != SCHEMA:
            raise ResultsError(f"{path} has version {data['schema']} of the results, this is version {SCHEMA}")
        try:
            rows = [_row(row) for row in data.pop("rows")]
            run = Run(rows=rows, **data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"{path} is no result of a benchmark: {error}") from error
        if run.kind not in KINDS:
            raise ResultsError(f"{path} is of kind {run.kind!r}, which must be one of {', '.join(KINDS)}")
        return run

    def save_csv(self, path: Path | str, peers: Sequence[str]) -> None:
        """Write the table, a row a case."""
        head = ["case", "kind", "op", "direction", "shape", "dtype", "channels_last", "correct"]
        head += ["floor_bytes", "torch_bytes", "us", "us_low", "us_high", "GB/s", "fraction_of_copy"]
        head += [f"{peer}_us" for peer in peers] + [f"{peer}_ratio" for peer in peers] + ["notes"]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            for row in self.rows:
                ours = row.timings.get(_OURS)
                cells: list[Any] = [row.case, self.kind, row.op, row.direction, "x".join(map(str, row.shape))]
                cells += [row.dtype, row.channels_last, row.correct, row.floor_bytes, row.torch_bytes]
                cells += [ours.median, ours.low, ours.high] if ours else [None] * 3
                cells += [row.gb_per_s, row.fraction(self.copy_gb_per_s)]
                cells += [row.timings[peer].median if peer in row.timings else None for peer in peers]
                cells += [row.ratio(peer) for peer in peers]
                cells.append("; ".join(row.notes))
                writer.writerow([f"{cell:.4g}" if isinstance(cell, float) else cell for cell in cells])


def _row(data: dict[str, Any]) -> Row:
    timings = {name: Timing(**timing) for name, timing in data.pop("timings").items()}
    unknown = data.keys() - {f.name for f in fields(Row)}
    if unknown:
        raise TypeError(f"unknown fields {sorted(unknown)}")
    return Row(timings=timings, **data)


# ---- Two runs --------------------------------------------------------------------------------------------------------


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


# ---- A run as text ---------------------------------------------------------------------------------------------------


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
