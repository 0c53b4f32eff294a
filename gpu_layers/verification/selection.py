"""Choosing cases by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def named_like(cases: Iterable[T], only: str | None) -> list[T]:
    """The cases whose name a regular expression finds; all of them for None.

    Raises
    ------
    ValueError
        If ``only`` is not a regular expression, or finds no case.
    """
    try:
        wanted = re.compile(only or "")
    except re.error as error:
        raise ValueError(f"{only!r} is not a regular expression: {error}") from error
    chosen = [case for case in cases if wanted.search(str(case))]
    if not chosen:
        raise ValueError(f"no case is named like {only!r}")
    return chosen
