"""The type of arrays in annotations."""

from __future__ import annotations

from typing import Any, TypeAlias

#: An array of NumPy or CuPy; within launchers, an operand of a program, which has a shape and a dtype but no memory.
#: Type checkers know of no protocol that all of them meet.
Array: TypeAlias = Any
