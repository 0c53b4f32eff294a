"""Taking over a state: what is given, converted and checked, before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gpu_layers.layers.arrays import memory_of, turned
from gpu_layers.runtime.cuda import array_module, is_cupy_array
from gpu_layers.runtime.kernel import FLOAT_DTYPES
from gpu_layers.runtime.writes import record_write

_COUNTER = "num_batches_tracked"


class IncompatibleKeys(NamedTuple):
    """What a state lacked, and what it had beside, as ``torch.nn.Module.load_state_dict`` returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not (self.missing_keys or self.unexpected_keys):
            return "<All keys matched successfully>"
        return f"IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


def load_arrays_into(own: Mapping[str, Any], state: Any, strict: bool, owner: str) -> IncompatibleKeys:
    """Write a state into arrays: all of it, or nothing where anything does not fit.

    Parameters
    ----------
    own : mapping of str to array
        Written in place.
    state : mapping of str to array
        NumPy, CuPy or torch; of any floating dtype where ``own`` is floating.
    strict : bool
        Whether a missing or unexpected key is an error.
    owner : str
        For messages.

    Returns
    -------
    IncompatibleKeys

    Raises
    ------
    ValueError
        For missing or unexpected keys, wrong shapes, a fractional count, or an array of ``own`` that is read-only.
    TypeError
        For a state that is no mapping, or values of a dtype that cannot be taken.
    """
    keys = _keys(state)
    taken = [name for name in own if name in keys]
    # PyTorch before 0.4.1 counted no batches; a checkpoint of those days has the averages alone.
    uncounted = [name for name in own if name not in keys and name.rpartition(".")[2] == _COUNTER]
    missing = [name for name in own if name not in keys and name not in uncounted]
    unexpected = [name for name in keys if name not in own]
    if strict and (missing or unexpected):
        raise ValueError(
            f"Error(s) in loading state_dict for {owner}: missing keys {missing}, unexpected keys {unexpected}"
        )
    arrays = {name: as_array(state[name], name) for name in taken}
    _check_shapes(arrays, own, owner)
    # Copies: what is given may be the arrays that are written to, in another order.
    ready = {name: converted(value, own[name], name, owner) for name, value in arrays.items()}
    for name in uncounted:
        if any(name.removesuffix(_COUNTER) + sibling in ready for sibling in ("running_mean", "running_var")):
            ready[name] = array_module(own[name]).zeros_like(own[name])
    _check_writable(ready, own)
    for name, value in ready.items():
        own[name][...] = value
        record_write(own[name])
    return IncompatibleKeys(missing, unexpected)


def _keys(state: Any) -> list[str]:
    if isinstance(state, Mapping) or (hasattr(state, "keys") and hasattr(state, "__getitem__")):
        return list(state.keys())
    # What cupy.load makes of an .npz file has items and no keys.
    names = getattr(getattr(state, "npz_file", None), "files", None)
    if names is None:
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state)}.")
    return list(names)


def as_array(value: Any, name: str) -> Any:
    """A value of a state as an array of NumPy or CuPy; one of torch keeps its memory where it can.

    Raises
    ------
    TypeError
        For a tensor that has no values, or is sparse or quantized.
    """
    if is_cupy_array(value):
        return value
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return np.asarray(value)
    try:
        tensor = value.detach().cpu()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            # bfloat16 and smaller: NumPy does not know them, and float32 holds each of their values.
            tensor = tensor.float()
        return tensor.resolve_neg().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise TypeError(f"{name} is a tensor that cannot be read as an array: {error}") from error


def _check_shapes(arrays: Mapping[str, Any], own: Mapping[str, Any], owner: str) -> None:
    wrong = [
        f"size mismatch for {name}: copying a param with shape {list(value.shape)}, "
        f"the shape in {owner} is {list(own[name].shape)}"
        for name, value in arrays.items()
        if tuple(value.shape) != own[name].shape
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def converted(value: Any, own: Any, name: str, owner: str) -> Any:
    """A copy in the dtype of ``own`` and where that is: floating numbers rounded, counts exact."""
    # Of either byte order; bfloat16 is no floating dtype to NumPy.
    floating = value.dtype.kind == "f" or value.dtype in FLOAT_DTYPES
    counts = own.dtype not in FLOAT_DTYPES
    if not (floating or (counts and value.dtype.kind in "iu")):
        raise TypeError(f"dtype mismatch for {name}: {value.dtype} given, {own.dtype} in {owner}")
    xp = array_module(own)
    with np.errstate(over="ignore", invalid="ignore"):
        copy = value.astype(own.dtype)
    if counts and floating and not bool((copy == value).all()):
        raise ValueError(f"{name} counts, and cannot be {value.tolist()}")
    if xp is np:
        return copy.get() if is_cupy_array(copy) else copy
    return xp.asarray(copy)


def _check_writable(ready: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless everything can be written, and to each memory one value."""
    locked = [name for name in ready if isinstance(own[name], np.ndarray) and not own[name].flags.writeable]
    if locked:
        raise ValueError(f"{', '.join(locked)}: the layer's own array is read-only; put a copy into its place first")
    first: dict[Any, str] = {}
    for name, value in ready.items():
        other = first.setdefault(memory_of(own[name]), name)
        if other != name and not _equal(turned(ready[other], own[other], own[name]), value):
            raise ValueError(f"{other} and {name} are one array here, and differ in the state")


def _equal(one: Any, other: Any) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())
