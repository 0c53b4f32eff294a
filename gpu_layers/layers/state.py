"""Loading a state: its values are converted and checked before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, is_cupy_array, place_of
from gpu_layers.core.writes import record_write
from gpu_layers.layers.arrays import memory_of, turned
from gpu_layers.runtime.copying import natural, overwrite
from gpu_layers.runtime.kernel import FLOAT_DTYPES

__all__ = ["IncompatibleKeys"]

_COUNTER = "num_batches_tracked"


class IncompatibleKeys(NamedTuple):
    """Keys that a state lacks, and keys that do not belong to it, as PyTorch's ``load_state_dict`` returns them."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not (self.missing_keys or self.unexpected_keys):
            return "<All keys matched successfully>"
        return f"IncompatibleKeys(missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys})"


def load_arrays_into(own: Mapping[str, Array], state: Any, strict: bool, owner: str) -> IncompatibleKeys:
    """Write a state into arrays: all of it, or nothing if anything does not fit.

    Parameters
    ----------
    own : mapping of str to array
        Written in place.
    state : mapping of str to array
        NumPy, CuPy or torch; of any floating dtype if ``own`` is floating.
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
        For a state that is not a mapping, or values of a dtype that does not fit.
    """
    keys = _keys(state)
    taken = [name for name in own if name in keys]
    # PyTorch before 0.4.1 did not count batches: its checkpoints have the averages alone.
    uncounted = [name for name in own if name not in keys and name.rpartition(".")[2] == _COUNTER]
    missing = [name for name in own if name not in keys and name not in uncounted]
    unexpected = [name for name in keys if name not in own]
    if strict and (missing or unexpected):
        raise ValueError(
            f"Error(s) in loading state_dict for {owner}: missing keys {missing}, unexpected keys {unexpected}"
        )
    arrays = {name: as_array(state[name], name) for name in taken}
    _check_shapes(arrays, own, owner)
    # Copies: the values may be the very arrays that are written to, in another order.
    ready = {name: converted(value, own[name], name, owner) for name, value in arrays.items()}
    for name in uncounted:
        if any(name.removesuffix(_COUNTER) + sibling in ready for sibling in ("running_mean", "running_var")):
            with place_of(own[name]):
                ready[name] = array_module(own[name]).zeros_like(own[name])
    _check_writable(ready, own)
    for name, value in ready.items():
        overwrite(own[name], value)
        record_write(own[name])
    return IncompatibleKeys(missing, unexpected)


def _keys(state: object) -> list[str]:
    if isinstance(state, Mapping) or (hasattr(state, "keys") and hasattr(state, "__getitem__")):
        return list(state.keys())
    # The result of cupy.load for an .npz file has items but no keys.
    names = getattr(getattr(state, "npz_file", None), "files", None)
    if names is None:
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state)}.")
    return list(names)


def as_array(value: object, name: str) -> Array:
    """A value of a state as an array of NumPy or CuPy; a tensor keeps its memory if possible.

    Raises
    ------
    TypeError
        For a tensor without values, or a sparse or quantized one.
    """
    if is_cupy_array(value):
        return value
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return np.asarray(value)
    try:
        tensor = value.detach().cpu()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            # NumPy does not know bfloat16 and smaller types; float32 holds all of their values.
            tensor = tensor.float()
        return tensor.resolve_neg().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise TypeError(f"{name} is a tensor that cannot be read as an array: {error}") from error


def _check_shapes(arrays: Mapping[str, Array], own: Mapping[str, Array], owner: str) -> None:
    wrong = [
        f"size mismatch for {name}: copying a param with shape {list(value.shape)}, "
        f"the shape in {owner} is {list(own[name].shape)}"
        for name, value in arrays.items()
        if tuple(value.shape) != own[name].shape
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def converted(value: Any, own: Array, name: str, owner: str) -> Array:
    """A copy in the dtype and on the device of ``own``: floating numbers are rounded, counts are exact."""
    # In either byte order; for NumPy bfloat16 is not a floating dtype.
    floating = value.dtype.kind == "f" or value.dtype in FLOAT_DTYPES
    counts = own.dtype not in FLOAT_DTYPES
    if not (floating or (counts and value.dtype.kind in "iu")):
        raise TypeError(f"dtype mismatch for {name}: {owner} has {own.dtype}, got {value.dtype}")
    with np.errstate(over="ignore", invalid="ignore"), place_of(value):
        value = natural(value)
        copy = value.astype(own.dtype)
        if counts and not bool((copy == value).all()):
            raise ValueError(f"{name} must be a whole number below 2**63, got {value.tolist()}")
        if is_cupy_array(copy) and not (is_cupy_array(own) and own.data.device_id == copy.data.device_id):
            copy = copy.get()
    with place_of(own):
        return array_module(own).asarray(copy)


def _check_writable(ready: Mapping[str, Array], own: Mapping[str, Array]) -> None:
    """Raise unless all arrays can be written, each with one value."""
    locked = [name for name in ready if isinstance(own[name], np.ndarray) and not own[name].flags.writeable]
    if locked:
        raise ValueError(f"{', '.join(locked)}: the layer's own array is read-only; replace it by a copy first")
    first: dict[Hashable, str] = {}
    for name, value in ready.items():
        other = first.setdefault(memory_of(own[name]), name)
        if other != name and not _equal(turned(ready[other], own[other], own[name]), value):
            raise ValueError(f"{other} and {name} are the same array here, but differ in the state")


def _equal(one: Array, other: Array) -> bool:
    with place_of(one):
        return bool(((one == other) | ((one != one) & (other != other))).all())
