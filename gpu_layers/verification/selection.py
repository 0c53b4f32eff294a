"""Choosing by names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def named_like(
    things: Iterable[T], only: str | None, what: str = "case", name: Callable[[Any], str] = str, hint: str = ""
) -> list[T]:
    """The things whose name a regular expression finds; all of them for None.

    Parameters
    ----------
    things : iterable
    only : str or None
    what, hint : str
        What the message calls them, and what it adds where there is none.
    name : callable
        Gives a thing's name.

    Raises
    ------
    ValueError
        If ``only`` is not a regular expression, or finds nothing.
    """
    try:
        wanted = re.compile(only or "")
    except re.error as error:
        raise ValueError(f"{only!r} is not a regular expression: {error}") from error
    chosen = [thing for thing in things if wanted.search(name(thing))]
    if not chosen:
        raise ValueError(f"no {what} is named like {only!r}{hint}")
    return chosen
