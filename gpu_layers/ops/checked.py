"""Checks that depend on shapes, dtypes and arguments alone: made once for each of them."""

from __future__ import annotations

import marshal
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

_PLAIN = {int, float, bool, str, type(None), tuple, list}
# Of one check; the oldest go first.
_MOST = 4096


class Checked(Generic[Result]):
    """A check, and what it found for each shape, dtype and arguments.

    Parameters
    ----------
    check : callable
        ``check(arrays, *arguments)`` raises, or gives what follows from the shapes and dtypes of arrays (one, or a
        tuple of them and of Nones) and from the arguments. Used as a decorator.
    """

    def __init__(self, check: Callable[..., Result]) -> None:
        self._check = check
        self._found: dict[Any, Result] = {}
        self.__doc__ = check.__doc__

    def __call__(self, arrays: Any, *arguments: Any) -> Result:
        """What the check gives."""
        try:
            # Bytes tell what is equal but not alike, as 1, 1.0 and True; and lists have them too.
            key: Any = marshal.dumps(arguments, 2)
        except ValueError:
            return self._check(arrays, *arguments)
        if type(arrays) is tuple:
            key = (key, *[None if array is None else (array.shape, array.dtype) for array in arrays])
        else:
            key = (key, arrays.shape, arrays.dtype)
        found = self._found.get(key, self)
        if found is self:
            found = self._check(arrays, *arguments)
            # Numbers of NumPy have bytes that others have too.
            if _is_plain(arguments):
                if len(self._found) >= _MOST:
                    self._found.pop(next(iter(self._found)), None)
                self._found[key] = found
        return found  # type: ignore[return-value]


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN and (kind not in (tuple, list) or all(map(_is_plain, value)))
