"""Types in annotations: arrays, what becomes one, and values by name."""

from __future__ import annotations

from typing import Any, TypeAlias

from numpy.typing import ArrayLike, DTypeLike

__all__ = ["Array", "ArrayLike", "DTypeLike", "Facts", "Options"]

#: An array of NumPy or CuPy; within launchers, an operand of a program, which has a shape and a dtype but no memory.
#: Type checkers know of no protocol that all of them meet.
Array: TypeAlias = Any
#: Arguments of a call, by name.
Options: TypeAlias = dict[str, Any]
#: What is written as JSON, by name.
Facts: TypeAlias = dict[str, Any]
