"""Padded batches: the positions that count are the rows of a matrix."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from gpu_layers.reference.results import delivered

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ELEMENTWISE = ("x", "dy", "residual")
_OF_BATCH = ("valid", "x", "channels_last")


def padded(*results: int) -> Callable[[_Function], _Function]:
    """Decorator of a batch norm of the last axis: of a padded batch only the positions in ``valid`` reach it.

    Parameters
    ----------
    *results : int
        Which of the results have the shape of x: they are +0 at other positions.
    """

    def decorated(function: _Function) -> _Function:
        signature = inspect.signature(function)
        names = tuple(signature.parameters)
        # A backward is given them in the record of its forward.
        holder = "saved" if "saved" in names else "valid"
        place_of_holder = names.index(holder)

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            given: Any = arguments[place_of_holder] if place_of_holder < len(arguments) else options.get(holder)
            if (given.valid if holder == "saved" else given) is None:
                return function(*arguments, **options)
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            own, out = bound.arguments, bound.arguments.get("out")
            saved = own.get("saved")
            valid, x, last = (own[name] if saved is None else getattr(saved, name) for name in _OF_BATCH)

            def rows(array: np.ndarray | None) -> np.ndarray | None:
                return None if array is None else _with_last(array, last)[valid.mask]

            own.update({name: rows(own[name]) for name in _ELEMENTWISE if name in own})
            if saved is None:
                own.update(channels_last=True, valid=None)
            else:
                inputs = {"x": rows(x), "residual": rows(saved.residual)}
                own["saved"] = replace(saved, **inputs, channels_last=True, valid=None)
            if "out" in own:
                own["out"] = signature.parameters["out"].default
            found = function(*bound.args, **bound.kwargs)
            places = enumerate(out) if isinstance(out, tuple) else ((number, out) for number in results)
            for number, place in places:
                one = found[number]
                if one is None:
                    continue
                if number in results:
                    of_rows, one = one, np.zeros(x.shape, x.dtype)
                    _with_last(one, last)[valid.mask] = of_rows
                found = (*found[:number], delivered(one, place), *found[number + 1 :])
            return found

        return run  # type: ignore[return-value]

    return decorated


def _with_last(x: np.ndarray, channels_last: bool) -> np.ndarray:
    """A view with the channels on the last axis."""
    return x if channels_last else np.moveaxis(x, 1, -1)
