"""The page: one self-contained HTML file, made by a Jinja2 template."""

from __future__ import annotations

import base64
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpu_layers._version import __version__
from gpu_layers.study.claims import Report, Results, Text, number
from gpu_layers.study.formulas import formula_svg
from gpu_layers.study.lab import Lab
from gpu_layers.study.snippets import PREAMBLE
from gpu_layers.training.extras import import_extra

_TEMPLATES = Path(__file__).parent / "templates"
_RELATIONS = {"<=": "≤", ">=": "≥", "==": "="}


def render_page(reports: Sequence[Report], lab: Lab) -> str:
    """The reports as one HTML file: nothing in it is loaded from elsewhere.

    Parameters
    ----------
    reports : sequence of Report
        In the order of the page.
    lab : Lab
        Where they ran.

    Returns
    -------
    str

    Raises
    ------
    RuntimeError
        If Jinja2 or matplotlib is not installed.
    """
    jinja2 = import_extra("jinja2", extra="study")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    safe = import_extra("markupsafe", extra="study").Markup
    environment.filters |= {
        "number": number,
        "relation": _RELATIONS.__getitem__,
        "formula": lambda formula: safe(formula_svg(formula)),
        "data_uri": _data_uri,
        "both": lambda cell: cell if isinstance(cell, Text) else Text(str(cell), str(cell)),
    }
    return environment.get_template("page.html").render(
        reports=reports,
        quick=lab.quick,
        preamble=PREAMBLE,
        where=_where(lab),
        held=sum(outcome.holds for report in reports for outcome in report.outcomes if not outcome.claim.is_question),
        checks=sum(not outcome.claim.is_question for report in reports for outcome in report.outcomes),
        questions=sum(outcome.claim.is_question for report in reports for outcome in report.outcomes),
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _where(lab: Lab) -> Results:
    return {
        "version": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": lab.device,
    }
