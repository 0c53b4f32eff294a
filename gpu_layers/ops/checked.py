"""Checks that depend on shapes, dtypes and arguments alone: done once for each combination."""

from __future__ import annotations

import marshal
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

_PLAIN = {int, float, bool, str, type(None), tuple, list}
# Results that one check keeps; the oldest go first.
_MOST = 4096


class Checked(Generic[Result]):
    """A check, and its results by shapes, dtypes and arguments.

    Parameters
    ----------
    check : callable
        ``check(arrays, *arguments)`` raises, or returns what follows from the shapes and dtypes of the arrays (one, or
        a tuple of arrays and Nones) and from the arguments. Used as a decorator.
    """

    def __init__(self, check: Callable[..., Result]) -> None:
        self._check = check
        self._found: dict[Hashable, Result] = {}
        self.__doc__ = check.__doc__

    def __call__(self, arrays: Any, *arguments: Any) -> Result:
        """The check's result."""
        try:
            # Bytes distinguish values that are equal but not alike, such as 1, 1.0 and True, in lists too.
            key: Hashable = marshal.dumps(arguments, 2)
        except ValueError:
            return self._check(arrays, *arguments)
        if type(arrays) is tuple:
            described = [key]
            for array in arrays:
                described += (None,) if array is None else (array.shape, array.dtype)
            key = tuple(described)
        else:
            key = (key, (arrays.shape, arrays.dtype))
        found = self._found.get(key, self)
        if found is self:
            found = self._check(arrays, *arguments)
            # NumPy's numbers may have the bytes of other objects.
            if _is_plain(arguments):
                if len(self._found) >= _MOST:
                    self._found.pop(next(iter(self._found)), None)
                self._found[key] = found
        return found  # type: ignore[return-value]


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN and (kind not in (tuple, list) or all(map(_is_plain, value)))
