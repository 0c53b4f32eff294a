"""``gpu-layers study``: the claims of the field, reproduced on this machine."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpu_layers.cli.arguments import Commands, folder, integer
from gpu_layers.cli.device import CHOICES, choose_device
from gpu_layers.core.array import Facts
from gpu_layers.core.cache import write_atomically
from gpu_layers.study import STUDIES, Lab, Report, run_studies
from gpu_layers.study.claims import number
from gpu_layers.study.page import render_page
from gpu_layers.training.extras import import_extra, require_extras

_ALL = "all"
_PACKAGES = ("rich", "matplotlib", "jinja2", "sklearn", "threadpoolctl")


def add_command(commands: Commands) -> None:
    """Add this command to the parser's."""
    parser = commands.add_parser(
        "study",
        help="reproduce the claims about dropout, batch norm and pooling",
        description="Measures what is said about dropout, batch norm and pooling by running the layers, and writes a "
        "page with numbers and pictures. Without NAME: lists the studies. Exit status 1 if something that must hold "
        "does not.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a study, or all")
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        help="for index.html, results.json and figures/ (default: only the terminal)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and seeds: all studies in a minute")
    parser.add_argument("--device", choices=CHOICES, default="auto", help="auto, the default: the GPU if there is one")
    parser.add_argument(
        "--jobs",
        type=integer(1, 256),
        metavar="N",
        help="parts to run at a time, each in a process of its own (default: one a processor; on a GPU 1)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run studies, print verdicts, write the page.

    Returns
    -------
    int
        0, or 1 if a claim that must hold does not.
    """
    if arguments.name is None:
        print(_listed())
        return 0
    if arguments.name not in (*STUDIES, _ALL):
        raise ValueError(f"unknown study {arguments.name!r}: choose from {', '.join(STUDIES)}, {_ALL}")
    require_extras(*_PACKAGES, extra="study")
    if arguments.out is not None:
        _check_writable(arguments.out)
    studies = list(STUDIES.values()) if arguments.name == _ALL else [STUDIES[arguments.name]]
    device = choose_device(arguments.device)
    lab = Lab(quick=arguments.quick, device=device.name)
    jobs = arguments.jobs or (1 if lab.device == "cuda" else _processors())
    reports: dict[str, Report] = {}
    with _display([study.name for study in studies]) as (progress, line):
        if device.note:
            line(device.note)
        where = "CUDA kernels" if lab.device == "cuda" else "NumPy reference"
        line(f"{', '.join(study.name for study in studies)}: {where}, {jobs} at a time{', quick' * lab.quick}")
        for report in run_studies(studies, lab, jobs=jobs, progress=progress):
            reports[report.study.name] = report
            line(_as_text(report))
    in_order = [reports[study.name] for study in studies]
    if arguments.out is not None:
        _write(arguments.out, in_order, lab)
        print(f"wrote {arguments.out / 'index.html'}")
    checks = [one for report in in_order for one in report.outcomes if not one.claim.is_question]
    failed = [one for one in checks if one.failed]
    print(f"{len(checks)} checks, {len(failed)} failed." if failed else f"{len(checks)} checks, all hold.")
    return 1 if failed else 0


def _listed() -> str:
    width = max(map(len, STUDIES))
    lines = [f"{name:<{width}}  {study.title.en}" for name, study in STUDIES.items()]
    return "\n".join([*lines, f"{_ALL:<{width}}  Everything, as one page: gpu-layers study all --out DIR"])


def _as_text(report: Report) -> str:
    lines = [f"{report.study.name}: {report.study.title.en} ({report.seconds:.1f} s)"]
    for outcome in report.outcomes:
        claim = outcome.claim
        verdict = "holds" if outcome.holds else "not confirmed" if claim.is_question else "FAILED"
        lines.append(
            f"  {verdict:<13} {claim.name}: {number(outcome.measured)} {claim.criterion.relation} "
            f"{number(claim.criterion.bound)} ({claim.quantity.en})"
        )
    return "\n".join(lines)


def _check_writable(folder: Path) -> None:
    """Raise OSError now, not after minutes of work, if no file can be made in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{secrets.token_hex(8)}.partial"
    try:
        probe.touch()
    finally:
        probe.unlink(missing_ok=True)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _display(names: Sequence[str]) -> Iterator[tuple[Callable[[str, float], None], Callable[[str], None]]]:
    """A bar for each study on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        yield lambda study, done: None, lambda text: print(text, flush=True)
        return
    rich = import_extra("rich.progress", extra="study")
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TaskProgressColumn())
    with rich.Progress(*columns, transient=True) as bar:
        tasks = {name: bar.add_task(name, total=1.0) for name in names}
        yield (
            lambda study, done: bar.update(tasks[study], completed=done),
            lambda text: bar.console.print(text, highlight=False, markup=False, soft_wrap=True),
        )


def _write(folder: Path, reports: Sequence[Report], lab: Lab) -> None:
    """The numbers for programs, each figure as a file, and the page: first what took minutes, last what may fail."""
    write_atomically(folder / "results.json", (json.dumps(_as_data(reports, lab), indent=2) + "\n").encode())
    for report in reports:
        for figure in report.findings.figures:
            write_atomically(folder / "figures" / f"{report.study.name}-{figure.name}.svg", figure.svg["en"].encode())
            if figure.failure:
                print(
                    f"gpu-layers: warning: figure {figure.name} of {report.study.name} is not drawn: {figure.failure}",
                    file=sys.stderr,
                )
    write_atomically(folder / "index.html", render_page(reports, lab).encode())


def _as_data(reports: Sequence[Report], lab: Lab) -> Facts:
    return {
        "quick": lab.quick,
        "device": lab.device,
        "studies": {
            report.study.name: {
                "seconds": round(report.seconds, 1),
                "claims": {
                    outcome.claim.name: {
                        "statement": outcome.claim.statement.en,
                        "is_question": outcome.claim.is_question,
                        # Not every reader of JSON takes NaN and infinity.
                        "measured": outcome.measured if abs(outcome.measured) < float("inf") else None,
                        "relation": outcome.claim.criterion.relation,
                        "bound": outcome.claim.criterion.bound,
                        "holds": outcome.holds,
                    }
                    for outcome in report.outcomes
                },
            }
            for report in reports
        },
    }
