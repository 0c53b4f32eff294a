"""What a compiled kernel takes, and whether given values fit it."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from . import abi


class Kind(enum.IntEnum):
    """``ParameterKind`` of ``host/launch_abi.h``."""

    OTHER = 0
    FLOAT = 1
    HALF = 2
    BFLOAT16 = 3
    SIGNED = 4
    UNSIGNED = 5
    BOOL = 6
    VOID = 7


@dataclass(frozen=True)
class ParameterType:
    """One parameter, as the C++ compiler sees it.

    Attributes
    ----------
    c_type : str
        Its type, e.g. ``const float*``.
    size : int
        Bytes of the value; for a pointer, of what it points to.
    kind : Kind
        Of the value; for a pointer, of what it points to.
    is_pointer, is_const : bool
        Whether it is an array, and whether the kernel may only read it.
    """

    c_type: str
    size: int
    kind: Kind
    is_pointer: bool
    is_const: bool

    @property
    def dtype(self) -> np.dtype | None:
        """The NumPy dtype of the value or pointee; None where any of that size will do."""
        return _dtype(self.kind, self.size)

    @classmethod
    def from_record(cls, record: abi.ParameterRecord) -> ParameterType:
        """Read what the compiled module says of one parameter."""
        text = record.pretty_function.decode()
        match = re.search(r"\bT = (.*?)[\];]", text)
        c_type = re.sub(r"\s*\*", "*", match.group(1)) if match else "?"
        return cls(c_type, record.size, Kind(record.kind), bool(record.is_pointer), bool(record.is_const))


def _dtype(kind: Kind, size: int) -> np.dtype | None:
    if kind is Kind.HALF:
        return np.dtype(np.float16)
    if kind is Kind.BFLOAT16:
        return np.dtype(ml_dtypes.bfloat16)
    if kind is Kind.BOOL:
        return np.dtype(np.bool_)
    letter = {Kind.FLOAT: "f", Kind.SIGNED: "i", Kind.UNSIGNED: "u"}.get(kind)
    return np.dtype(f"{letter}{size}") if letter else None


def _fits(parameter: ParameterType, dtype: np.dtype) -> bool:
    expected = parameter.dtype
    if expected is not None:
        return dtype == expected
    if parameter.kind is Kind.VOID:
        return True
    if parameter.is_pointer:  # float4*, or a struct: whole elements make it up
        return dtype.itemsize > 0 and (
            parameter.size % dtype.itemsize == 0 if dtype.names is None else dtype.itemsize == parameter.size
        )
    return dtype.itemsize == parameter.size


def _wanted(parameter: ParameterType) -> str:
    expected = parameter.dtype
    if expected is not None:
        return str(expected)
    return "any dtype" if parameter.kind is Kind.VOID else f"a dtype of {parameter.size} bytes"


def check_values(
    kernel: str, parameters: Sequence[ParameterType], values: Sequence[object], labels: Sequence[str]
) -> None:
    """Refuse what a GPU would silently misread.

    Raises
    ------
    TypeError
        For a wrong number of values, a wrong dtype, or an array where a scalar belongs.
    ValueError
        For a read-only array that the kernel may write.
    """
    if len(values) != len(parameters):
        raise TypeError(f"{kernel} takes {len(parameters)} arguments, got {len(values)}")
    for parameter, value, label in zip(parameters, values, labels, strict=True):
        where = f"{kernel}: {label} ({parameter.c_type})"
        if parameter.is_pointer:
            if value is None:
                continue
            if not isinstance(value, np.ndarray):
                raise TypeError(f"{where} takes a numpy.ndarray or None, got {type(value).__name__}")
            if not _fits(parameter, value.dtype):
                raise TypeError(f"{where} takes an array of {_wanted(parameter)}, got {value.dtype}")
            if not parameter.is_const and not value.flags.writeable:
                raise ValueError(f"{where} may be written, but the array is read-only")
        else:
            if not isinstance(value, np.ndarray | np.generic):
                raise TypeError(
                    f"{where} takes a NumPy scalar of {_wanted(parameter)}, got {type(value).__name__}: "
                    "its size would be a guess"
                )
            if value.size != 1 or not _fits(parameter, value.dtype):
                raise TypeError(
                    f"{where} takes one value of {_wanted(parameter)}, got {value.dtype} of shape {value.shape}"
                )
