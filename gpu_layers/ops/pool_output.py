"""Writing results of pooling operations into arrays of the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.ops.checks import check_result
from gpu_layers.runtime.writes import record_write


def output_shape(x: Array, spatial: tuple[int, ...], batched: bool, channels_last: bool) -> tuple[int, ...]:
    """x's shape with other spatial sizes."""
    lead, channels = x.shape[:1] if batched else (), x.shape[-1 if channels_last else int(batched)]
    return (*lead, *spatial, channels) if channels_last else (*lead, channels, *spatial)


def filled(
    out: Array,
    shape: tuple[int, ...],
    dtype: np.dtype,
    inputs: tuple[Any, ...],
    batched: bool,
    fill: Callable[..., Any],
) -> Any:
    """The result of ``fill``, written to ``out`` if it is given, and what else ``fill`` returns.

    Parameters
    ----------
    out : array or None
    shape, dtype
        Shape and dtype that out must have.
    inputs : tuple of array
        Arrays that out must not overlap.
    batched : bool
        Whether the result has a batch axis; fill's always has one.
    fill : callable
        Takes an array with a batch axis to write to, or None to make one; returns it, or a tuple that begins with it.

    Returns
    -------
    (array, others)
        The result, and what else fill returns.

    Raises
    ------
    TypeError, ValueError
        If out cannot take the result.
    """
    if out is not None:
        check_result(out, shape, dtype, *inputs)
    result = fill(out if out is None or batched else out[None])
    first, others = (result[0], result[1:]) if isinstance(result, tuple) else (result, ())
    if out is not None:
        record_write(out)
        return out, others
    return first if batched else first[0], others
