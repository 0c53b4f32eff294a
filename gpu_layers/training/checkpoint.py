"""Arrays and facts in one file; a damaged file is refused.

It is a safetensors file: it holds no code, and other programs can read it. All facts are one JSON text under the single
metadata key ``gpu_layers`` (the order of several keys would vary), and include a SHA-256 of everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gpu_layers.core.array import Facts
from gpu_layers.core.cache import write_atomically
from gpu_layers.training.extras import import_extra

_KEY = "gpu_layers"
_VERSION = 1


def save_arrays(path: Path, kind: str, arrays: Mapping[str, np.ndarray], facts: Mapping[str, object]) -> None:
    """Write a file atomically: readers find the old or the new content, also after a crash at any moment.

    Parameters
    ----------
    path : Path
    kind : str
        Kind of the file, e.g. "checkpoint", which :func:`load_arrays` compares.
    arrays : mapping of str to ndarray
    facts : mapping of str to object
        Anything that JSON can hold.

    Raises
    ------
    OSError
        If it could not be written; an old file then stays.
    RuntimeError
        If safetensors is not installed.
    """
    safetensors = import_extra("safetensors.numpy")
    header = {"kind": kind, "version": _VERSION, **facts}
    header["sha256"] = _checksum(arrays, header)
    contiguous = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in arrays.items()}
    write_atomically(path, safetensors.save(contiguous, metadata={_KEY: json.dumps(header, allow_nan=False)}))


def load_arrays(path: Path, kind: str) -> tuple[dict[str, np.ndarray], Facts]:
    """Read a file of :func:`save_arrays`.

    Returns
    -------
    arrays : dict of str to ndarray
    facts : dict of str to object

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is damaged, foreign, of another kind or of an unknown version.
    RuntimeError
        If safetensors is not installed.
    """
    safetensors = import_extra("safetensors.numpy")
    content = Path(path).read_bytes()
    try:
        arrays = safetensors.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    # A damaged file may make the reader raise anything.
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a {kind} file ({error})") from error
    try:
        header = json.loads(metadata[_KEY])
        checksum = header.pop("sha256")
        found, version = header.pop("kind"), header.pop("version")
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a {kind} file of gpu-layers") from error
    if (found, version) != (kind, _VERSION):
        raise ValueError(
            f"expected a {kind} file of version {_VERSION}, got a {found} file of version {version}: {path}"
        )
    if checksum != _checksum(arrays, {"kind": found, "version": version, **header}):
        raise ValueError(f"{path} is damaged: its checksum does not match its content")
    return arrays, header


def _checksum(arrays: Mapping[str, np.ndarray], header: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, allow_nan=False).encode())
    for name in sorted(arrays):
        value = arrays[name]
        digest.update(f"\n{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
