"""Kernels: the function, its ``.cu`` file, and its parameters, which are read there."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.runtime.sources import source_folder

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: The dtypes that every operation takes.
FLOAT_DTYPES = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))

#: C++ name of every type in the parameter lists and template arguments of kernels.
C_TYPES: dict[str, np.dtype] = {
    "__half": np.dtype(np.float16),
    "__nv_bfloat16": BFLOAT16,
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "unsigned char": np.dtype(np.uint8),
    "signed char": np.dtype(np.int8),
    "short": np.dtype(np.int16),
    "unsigned short": np.dtype(np.uint16),
    "int": np.dtype(np.int32),
    "unsigned int": np.dtype(np.uint32),
    "long long": np.dtype(np.int64),
    "unsigned long long": np.dtype(np.uint64),
}
_C_NAMES = {dtype: name for name, dtype in C_TYPES.items()}


#: Of whole numbers, which max pooling takes too.
INTEGER_DTYPES = tuple(np.dtype(f"{sign}int{bits}") for bits in (8, 16, 32, 64) for sign in ("u", ""))
#: Arguments of a kernel: operands, None, numbers and structs.
Arguments: TypeAlias = tuple[Any, ...]


def c_name(dtype: np.dtype) -> str:
    """C++ name of a NumPy dtype, e.g. ``__half`` for float16."""
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
        Dtype of the elements, for a pointer, or of the value (a structured dtype for a struct).
    is_pointer, is_const : bool
        Whether it is an array, and whether the kernel only reads it.
    """

    name: str
    c_type: str
    dtype: np.dtype
    is_pointer: bool
    is_const: bool


@dataclass(frozen=True, eq=False)
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
    initialised : tuple of str
        Parameters that the kernel writes and that hold values before, which it may read.
    """

    source: str
    name: str
    parameters: tuple[Parameter, ...]
    initialised: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


@cache
def _text(source: str) -> str:
    """A ``.cu`` file without its comments."""
    return re.sub(r"//.*", "", (source_folder() / source).read_text(encoding="utf-8"))


def declared_parameters(source: str, function: str) -> str:
    """The parameter list of a ``__global__`` function template in a ``.cu`` file.

    Raises
    ------
    ValueError
        If the file declares no such function.
    """
    declaration = rf"__global__[^;{{}}]*?\b{function}\(([^)]*)\)\s*\{{"
    found = re.search(declaration, _text(source))
    if found is None:
        raise ValueError(f"{source} has no __global__ function {function}")
    return found[1].replace("accumulate_t<T>", "A")


def parse_parameters(
    signature: str, types: Mapping[str, str], structs: Mapping[str, np.dtype] | None = None
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

    Returns
    -------
    tuple of Parameter
    """
    structs = structs or {}
    parameters = []
    for declaration in filter(None, (part.strip() for part in signature.split(","))):
        words = declaration.replace("*", " * ").split()
        name = words.pop()
        is_const = words[0] == "const"
        if is_const:
            words.pop(0)
        is_pointer = words[-1] == "*"
        if is_pointer:
            words.pop()
        base = " ".join(words)
        base = re.sub(r"\w+", lambda word: types.get(word[0], word[0]), base)
        dtype = structs[base] if base in structs else C_TYPES[base]
        c_type = f"{'const ' if is_const else ''}{base}{'*' if is_pointer else ''}"
        parameters.append(Parameter(name, c_type, dtype, is_pointer, is_const))
    return tuple(parameters)


class KernelTemplate:
    """A ``__global__`` function template, and all instantiations that launchers use.

    Parameters
    ----------
    source : str
        File in ``cuda_src/``, where its parameters are read when it is first asked for.
    function : str
        Name of the template.
    instantiations : iterable of dict of str to str
        C++ template arguments of each, in the order of the template's parameters; see :func:`combinations`.
    structs : mapping of str to numpy.dtype, optional
        Layout of each struct passed by value; ``A`` in its name is the type in which ``T`` is computed.
    initialised : sequence of str
        Of those of its parameters: see :class:`Kernel`.
    """

    def __init__(
        self,
        source: str,
        function: str,
        instantiations: Iterable[Mapping[str, str]],
        structs: Mapping[str, np.dtype] | None = None,
        initialised: Sequence[str] = (),
    ) -> None:
        self._source, self._function = source, function
        self._instantiations = [dict(arguments) for arguments in instantiations]
        self._structs, self._initialised = structs, initialised
        _templates.append(self)

    @cached_property
    def _kernels(self) -> dict[frozenset[tuple[str, str]], Kernel]:
        signature = declared_parameters(self._source, self._function)
        made = {}
        for arguments in self._instantiations:
            types = dict(arguments)
            if "T" in types:
                types["A"] = accumulate_name(types["T"])
            name = f"{self._function}<{', '.join(arguments.values())}>"
            parameters = parse_parameters(signature, types, self._structs)
            held = tuple(one.name for one in parameters if one.name in self._initialised)
            made[frozenset(arguments.items())] = Kernel(self._source, name, parameters, held)
        return made

    def __call__(self, **arguments: str) -> Kernel:
        """The instantiation with these template arguments; KeyError if it was not declared."""
        return self._kernels[frozenset(arguments.items())]

    def get(self, **arguments: str) -> Kernel | None:
        """The same; None if it was not declared."""
        return self._kernels.get(frozenset(arguments.items()))

    def kernels_for(self, dtypes: Iterable[np.dtype]) -> list[Kernel]:
        """The instantiations for arrays of these dtypes: ``T`` is one, ``A`` the type in which it is computed."""
        every = {c_name(dtype) for dtype in FLOAT_DTYPES}
        elements = {c_name(dtype) for dtype in dtypes}
        # Kernels without an element dtype, such as those for seeds, are needed by all.
        others = {"T": every - elements, "A": every - {accumulate_name(element) for element in elements}}
        return [
            kernel
            for arguments, kernel in self._kernels.items()
            if not any(value in others.get(name, ()) for name, value in arguments)
        ]

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every instantiation."""
        return tuple(self._kernels.values())


_templates: list[KernelTemplate] = []


def combinations(**choices: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of template arguments, e.g. ``combinations(T=("float", "double"), Width=("1", "4"))``."""
    return [dict(zip(choices, arguments, strict=True)) for arguments in itertools.product(*choices.values())]


def accumulate_name(element: str) -> str:
    """C++ type in which an element type is computed: ``accumulate_t`` of ``numeric.cuh``."""
    return c_name(accumulation_dtype(C_TYPES[element]))


def all_kernels(dtypes: Iterable[np.dtype] | None = None) -> list[Kernel]:
    """Every instantiation of every declared template, or those for some dtypes."""
    if dtypes is None:
        return [kernel for template in _templates for kernel in template.kernels]
    chosen = tuple(dtypes)
    return [kernel for template in _templates for kernel in template.kernels_for(chosen)]
