"""Padded batches: the positions that count are the rows of a matrix."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_layers.reference.results import delivered

_ELEMENTWISE = ("x", "dy", "residual")


def padded(*results: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a batch norm of the last axis: of a padded batch only the positions in ``valid`` reach it.

    Parameters
    ----------
    *results : int
        Which of the results have the shape of x: they are +0 at other positions.
    """

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            own = bound.arguments
            valid, x, last, out = own["valid"], own["x"], own["channels_last"], own.get("out")
            if valid is None:
                return function(*arguments, **options)
            rows = {name: _with_last(own[name], last)[valid.mask] for name in _ELEMENTWISE if own.get(name) is not None}
            own.update(rows, channels_last=True, valid=None)
            if "out" in own:
                own["out"] = signature.parameters["out"].default
            found = function(*bound.args, **bound.kwargs)
            places = out if isinstance(out, tuple) else (out,) * len(results)
            for number, place in zip(results, places, strict=True):
                of_rows = found[number]
                if of_rows is None:
                    continue
                whole = np.zeros(x.shape, x.dtype)
                _with_last(whole, last)[valid.mask] = of_rows
                found = (*found[:number], delivered(whole, place), *found[number + 1 :])
            return found

        return run

    return decorated


def _with_last(x: np.ndarray, channels_last: bool) -> np.ndarray:
    """A view with the channels on the last axis."""
    return x if channels_last else np.moveaxis(x, 1, -1)
