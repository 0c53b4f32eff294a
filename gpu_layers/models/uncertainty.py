"""Uncertainty of a network's output, by dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from gpu_layers import random
from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.layers.activation_dropout import ActivationDropout
from gpu_layers.layers.base import Layer
from gpu_layers.layers.dropout import Dropout, DropoutLayer, first_decision
from gpu_layers.layers.dropout_add import DropoutAdd
from gpu_layers.layers.layer_tree import layers_of, modes
from gpu_layers.ops.dropout import check_passes, dropout_moments
from gpu_layers.runtime.copying import natural, own_copy


def mc_dropout(
    model: Callable[..., object], x: Array, passes: int = 10, *, layers: Iterable[Layer] | None = None, **inputs: object
) -> tuple[Array, Array]:
    """Mean and variance of a model's output over passes with different dropout masks (Gal and Ghahramani, 2016).

    Dropout layers drop; all others, batch norm included, evaluate. Afterwards, also after an exception, every layer has
    the mode that it had before. A single :class:`Dropout` layer without shared axes needs one kernel launch for all
    passes.

    Parameters
    ----------
    model : Layer or callable
        Takes x, returns an array. Layers are found in its attributes, at any depth; for a ``functools.partial`` in its
        function and arguments.
    x : array
    passes : int
        From 1 to ``2**24``; each takes one offset of each dropout layer's generator.
    layers : iterable of Layer, optional
        The layers whose mode to set, if the model is a function: it does not show which layers it calls. Without this
        argument they keep their modes.
    **inputs
        Passed on to the model, such as ``sample_ids``.

    Returns
    -------
    mean, variance : array
        The output's shape; float64 for float64, float32 for all others. The variance is divided by ``passes``. Both are
        computed from the outputs as the model returns them, rounded to its dtype. If one of these is infinite or NaN,
        so is the mean, and the variance is NaN.

    Raises
    ------
    TypeError, ValueError
        For passes out of range, a model that cannot be called, or a model that is not a function and holds no dropout
        layer; also whatever the model raises.
    """
    passes = check_passes(passes)
    if not callable(model):
        raise TypeError(f"model must be a layer or a function, got {type(model).__name__}")
    found = layers_of(model, layers)
    if layers is None and found and not any(_drops(layer) for layer in found):
        raise ValueError(
            f"found no dropout layer among the {len(found)} layers of the model, whose variance would be 0: "
            "name its layers with layers="
        )
    generator = getattr(model, "generator", None) or random.default_generator
    alone = type(model) is Dropout and not model.shared_axes and generator.rng_state is None
    if alone and isinstance(model, Dropout) and inputs.keys() <= {"sample_ids"}:
        scale = None if model.scaling == "inverted" else 1.0
        start = 0 if inputs.get("sample_ids") is not None else first_decision(x, model.first_sample)
        seed, offset = generator.take(passes)
        try:
            return dropout_moments(x, model.p, seed, offset, passes=passes, scale=scale, start=start, **inputs)
        except BaseException:
            generator.give_back(offset, passes)
            raise
    # A layer that works in place would change what the next pass sees.
    in_place = any(getattr(layer, "inplace", False) for layer in found)
    with modes(found, training=_drops):
        return _moments((model(own_copy(x) if in_place else x, **inputs) for _ in range(passes)), passes)


def _moments(outputs: Iterator[Array], passes: int) -> tuple[Array, Array]:
    """Running mean and variance (Welford); no output is kept.

    If an output is not finite, such as a half-precision one that overflowed, the mean is the sum of those outputs and
    the variance is NaN.
    """
    mean: Array = None
    variance: Array = None
    others: Array = None
    for count, output in enumerate(outputs, 1):
        with place_of(output), np.errstate(invalid="ignore", over="ignore", under="ignore"):
            y = natural(output).astype(accumulation_dtype(output.dtype))
            xp = array_module(y)
            is_finite, zero = xp.isfinite(y), y.dtype.type(0)
            finite, other = xp.where(is_finite, y, zero), xp.where(is_finite, zero, y)
            if mean is None:
                mean, variance, others = finite, xp.zeros_like(finite), other
                continue
            difference = finite - mean
            mean = mean + difference / count
            variance = variance * ((count - 1) / count) + difference * (finite - mean) / count
            others = others + other
    xp = array_module(mean)
    with place_of(mean):
        return xp.where(others == 0, mean, others), xp.where(others == 0, variance, variance.dtype.type(np.nan))


def _drops(layer: Layer) -> bool:
    return isinstance(layer, (DropoutLayer, ActivationDropout, DropoutAdd))
