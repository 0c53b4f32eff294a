"""Claims as data: what is said, the number that decides it, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from gpu_layers.study.lab import Lab

#: What a part of a study measured, or all parts, by name.
Results: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """The same words in the two languages of the page."""

    en: str
    zh: str


#: Of a table.
Cell: TypeAlias = Text | str | int | float


def same(words: str) -> Text:
    """Names and numbers, which are the same in both languages."""
    return Text(words, words)


@dataclass(frozen=True)
class Criterion:
    """What a measurement must be for a claim to hold.

    Attributes
    ----------
    relation : {"<=", ">=", "=="}
    bound : float
    reason : Text
        Why this bound.
    """

    relation: str
    bound: float
    reason: Text

    def holds(self, measured: float) -> bool:
        """Whether a measurement meets the criterion; NaN meets none."""
        if self.relation == "<=":
            return measured <= self.bound
        if self.relation == ">=":
            return measured >= self.bound
        return measured == self.bound


@dataclass(frozen=True)
class Claim:
    """One statement.

    Attributes
    ----------
    name : str
        Unique within its study.
    statement : Text
    formula : str
        In the part of TeX that matplotlib's mathtext knows.
    quantity : Text
        What is measured: the number that decides.
    criterion : Criterion
    code : str
        At most five lines of Python that show it, after :data:`gpu_layers.study.snippets.PREAMBLE`.
    is_question : bool
        Something that is often said, and put to the test: the answer is reported as it is, and no is an answer.
        Everything else must hold, and fails the study if it does not.
    """

    name: str
    statement: Text
    formula: str
    quantity: Text
    criterion: Criterion
    code: str
    is_question: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text or numbers under a title."""

    title: Text
    columns: Sequence[Text]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """A picture, drawn once for each language.

    Attributes
    ----------
    name : str
        Unique within its study.
    caption : Text
    svg : dict of str to str
        ``en`` and ``zh``.
    failure : str
        Why it could not be drawn: empty if it was. Numbers do not depend on it; ``svg`` then says so.
    """

    name: str
    caption: Text
    svg: Mapping[str, str]
    failure: str = ""


@dataclass(frozen=True)
class Findings:
    """What a study measured.

    Attributes
    ----------
    measured : dict of str to float
        By the claims' names.
    tables : list of Table
    figures : list of Figure
    """

    measured: Mapping[str, float]
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Outcome:
    """A claim after the measurement.

    Attributes
    ----------
    claim : Claim
    measured : float
    printed : str
        What the claim's code printed.
    """

    claim: Claim
    measured: float
    printed: str = ""

    @property
    def holds(self) -> bool:
        """Whether the criterion is met."""
        return self.claim.criterion.holds(self.measured)

    @property
    def failed(self) -> bool:
        """Whether something that must hold does not."""
        return not self.holds and not self.claim.is_question


@dataclass(frozen=True)
class Study:
    """A question, the claims that answer it, and how they are measured.

    Attributes
    ----------
    name : str
    title, summary : Text
    claims : tuple of Claim
    parts : dict of str to callable
        Each takes a :class:`Lab` and measures a part, the longest first; they may run in processes of their own.
    conclude : callable
        Takes what the parts returned, by name, and gives the findings.
    """

    name: str
    title: Text
    summary: Text
    claims: tuple[Claim, ...]
    parts: Mapping[str, Callable[[Lab], Any]]
    conclude: Callable[[Results], Findings]


@dataclass(frozen=True)
class Report:
    """A study that has run.

    Attributes
    ----------
    study : Study
    outcomes : list of Outcome
        One a claim, in their order.
    findings : Findings
    seconds : float
        Of all parts together.
    """

    study: Study
    outcomes: Sequence[Outcome]
    findings: Findings
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether a claim that must hold does not."""
        return any(outcome.failed for outcome in self.outcomes)


def judge(study: Study, findings: Findings, printed: Mapping[str, str], seconds: float = 0.0) -> Report:
    """Put measurements and claims together.

    Parameters
    ----------
    study : Study
    findings : Findings
    printed : dict of str to str
        What the claims' code printed, by name.
    seconds : float

    Raises
    ------
    KeyError
        If a claim was not measured.
    """
    outcomes = [
        Outcome(claim, float(findings.measured[claim.name]), printed.get(claim.name, "")) for claim in study.claims
    ]
    return Report(study, outcomes, findings, seconds)


def number(value: float) -> str:
    """A measurement as text: three digits, no more zeros than needed."""
    if not math.isfinite(value) or (value == int(value) and abs(value) < 1e6):
        return f"{value:g}"
    return f"{value:.3g}"
