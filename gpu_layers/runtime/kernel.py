"""What a kernel is: which function of which ``.cu`` file, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

#: C++ spelling of every type that may stand in a kernel's parameter list or template arguments.
C_TYPES: dict[str, np.dtype] = {
    "__half": np.dtype(np.float16),
    "__nv_bfloat16": BFLOAT16,
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "unsigned char": np.dtype(np.uint8),
    "unsigned short": np.dtype(np.uint16),
    "int": np.dtype(np.int32),
    "unsigned int": np.dtype(np.uint32),
    "long long": np.dtype(np.int64),
    "unsigned long long": np.dtype(np.uint64),
}
_C_NAMES = {dtype: name for name, dtype in C_TYPES.items()}


def c_name(dtype: np.dtype) -> str:
    """C++ spelling of a NumPy dtype, e.g. ``__half`` for float16."""
    return _C_NAMES[np.dtype(dtype)]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel.

    Attributes
    ----------
    name : str
        Its name in the ``.cu`` file.
    c_type : str
        Its full C++ type, e.g. ``const float*`` or ``PoolWindow``.
    dtype : numpy.dtype
        Of the elements pointed to, or of the value (a structured dtype for a struct).
    is_pointer, is_const : bool
        Whether it is an array, and whether the kernel only reads it.
    """

    name: str
    c_type: str
    dtype: np.dtype
    is_pointer: bool
    is_const: bool


@dataclass(frozen=True)
class Kernel:
    """An instantiated ``__global__`` function.

    Attributes
    ----------
    source : str
        File in ``cuda_src/``, e.g. ``dropout.cu``.
    name : str
        C++ name expression, e.g. ``dropout_forward<float>``.
    parameters : tuple of Parameter
        In order.
    """

    source: str
    name: str
    parameters: tuple[Parameter, ...]

    def __str__(self) -> str:
        return self.name


def parse_parameters(
    signature: str,
    types: Mapping[str, str],
    structs: Mapping[str, np.dtype] | None = None,
) -> tuple[Parameter, ...]:
    """Read a parameter list written as in the ``.cu`` file.

    Parameters
    ----------
    signature : str
        Comma-separated C++ parameters, e.g. ``"const T* x, T* y, long long n"``.
    types : mapping of str to str
        C++ types of the template parameters in it, e.g. ``{"T": "float"}``.
    structs : mapping of str to numpy.dtype, optional
        Layout of each struct passed by value.
    """
    structs = structs or {}
    parameters = []
    for declaration in signature.split(","):
        words = declaration.replace("*", " * ").split()
        name = words.pop()
        is_const = words[0] == "const"
        if is_const:
            words.pop(0)
        is_pointer = words[-1] == "*"
        if is_pointer:
            words.pop()
        base = " ".join(words)
        base = types.get(base, base)
        dtype = structs[base] if base in structs else C_TYPES[base]
        c_type = f"{'const ' if is_const else ''}{base}{'*' if is_pointer else ''}"
        parameters.append(Parameter(name, c_type, dtype, is_pointer, is_const))
    return tuple(parameters)
