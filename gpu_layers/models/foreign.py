"""Batch norm state from other libraries, and what their numbers mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_choice, check_finite, check_integer
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.writes import record_write
from gpu_layers.layers.base import moved
from gpu_layers.layers.batch_norm import BatchNormLayer
from gpu_layers.ops.checks import check_eps, described
from gpu_layers.runtime.copying import overwrite
from gpu_layers.runtime.kernel import FLOAT_DTYPES


@dataclass(frozen=True)
class _Library:
    """Names and defaults of a library; all of them keep ``momentum`` of the old average, not of the newest batch."""

    names: dict[str, str]
    kept: float
    eps: float
    biased_variance: bool
    count: str | None = None
    collections: tuple[str, ...] = ()


_LIBRARIES = {
    "keras": _Library(
        {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"},
        kept=0.99,
        eps=1e-3,
        biased_variance=True,
    ),
    "flax": _Library(
        {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"},
        kept=0.99,
        eps=1e-5,
        biased_variance=True,
        collections=("params", "batch_stats"),
    ),
    "chainer": _Library(
        {"weight": "gamma", "bias": "beta", "running_mean": "avg_mean", "running_var": "avg_var"},
        kept=0.9,
        eps=2e-5,
        biased_variance=False,
        count="N",
    ),
}


def load_foreign_batch_norm(
    layer: BatchNormLayer,
    state: Mapping[str, Array],
    library: str,
    *,
    momentum: float | None = None,
    eps: float | None = None,
    values_per_channel: int | None = None,
) -> None:
    """Load the state of a batch norm of Keras, Flax or Chainer, with its conventions; all or nothing.

    ===========  ==========================================  ========================  ==============  =======
    library      keys                                        momentum, eps by default  running = ...   var is
    ===========  ==========================================  ========================  ==============  =======
    ``keras``    gamma, beta, moving_mean, moving_variance   momentum 0.99, 1e-3       m r + (1 - m) b  biased
    ``flax``     scale, bias, mean, var                      momentum 0.99, 1e-5       m r + (1 - m) b  biased
    ``chainer``  gamma, beta, avg_mean, avg_var, N           decay 0.9, 2e-5           m r + (1 - m) b  unbiased
    ===========  ==========================================  ========================  ==============  =======

    Keys may begin with a common path, as ``"block/bn/gamma"`` or Keras' ``"bn/gamma:0"``. Flax' may be in its
    collections, ``{"params": {...}, "batch_stats": {...}}``. The layer's momentum becomes 1 minus theirs, and its eps
    becomes theirs, so that it evaluates as it did there. ``num_batches_tracked`` becomes Chainer's N, otherwise 0.

    Parameters
    ----------
    layer : batch norm
        With running statistics; with a weight and a bias exactly if the state has them.
    state : mapping of str to array_like
    library : {"keras", "flax", "chainer"}
    momentum, eps : float, optional
        The values of that library (Chainer's decay, Keras' and Flax' epsilon); its defaults otherwise.
    values_per_channel : int, optional
        Number of values per channel in a batch there, at least 2. A biased running variance then becomes the unbiased
        one that this library would have kept, which is larger by n / (n - 1); evaluation differs accordingly. (Keras 2
        kept the unbiased variance of four-dimensional input, by TensorFlow's fused kernel: omit this there.)

    Raises
    ------
    TypeError
        For a layer that is not a batch norm, a state that is not a mapping, or arrays that are not floating.
    ValueError
        For an unknown library, missing or foreign keys, wrong shapes, numbers out of range, or a layer without running
        statistics. Nothing is loaded then.
    """
    if not isinstance(layer, BatchNormLayer):
        raise TypeError(f"expected a batch norm layer, got {type(layer).__name__}")
    convention = _LIBRARIES[check_choice(library, "library", tuple(_LIBRARIES))]
    if not layer.track_running_stats:
        raise ValueError("the layer keeps no running statistics: there is nowhere to load the state's")
    layer._check_buffers()
    kept = convention.kept if momentum is None else check_finite(momentum, "momentum")
    new_eps = convention.eps if eps is None else eps
    check_eps(new_eps, layer.dtype)
    given = _without_path(_flat(state, convention, library), library)
    arrays, batches = _arrays(layer, given, convention, library)
    if values_per_channel is not None:
        values = check_integer(values_per_channel, "values_per_channel", 2, 2**63 - 1)
        if convention.biased_variance:
            arrays["running_var"] = arrays["running_var"] * (values / (values - 1))
    own = {**layer.parameters, **layer.buffers}
    for name, value in {**arrays, "num_batches_tracked": np.array(batches)}.items():
        with place_of(own[name]):
            overwrite(own[name], moved(value.astype(own[name].dtype), array_module(own[name])))
        record_write(own[name])
    layer.momentum, layer.eps = 1 - kept, float(new_eps)


def _flat(state: object, convention: _Library, library: str) -> dict[str, Array]:
    """The state without Flax' collections."""
    if not isinstance(state, Mapping):
        raise TypeError(f"Expected state to be dict-like, got {type(state)}.")
    flat: dict[str, Array] = {}
    for key, value in state.items():
        if not isinstance(value, Mapping):
            flat[str(key)] = value
        elif key in convention.collections:
            flat.update({str(name): one for name, one in value.items()})
        else:
            raise ValueError(f"expected the state of one {library} batch norm, got several arrays in {key!r}")
    return flat


def _without_path(state: dict[str, Array], library: str) -> dict[str, Array]:
    """Keys without their common path and without Keras' ``:0``."""
    parts = {key: key.removesuffix(":0").rpartition("/") for key in state}
    paths = sorted({path for path, _, _ in parts.values()})
    if len(paths) > 1:
        raise ValueError(f"expected the state of one {library} batch norm, got those of several layers: {paths}")
    return {parts[key][2]: value for key, value in state.items()}


def _arrays(
    layer: BatchNormLayer, given: dict[str, Array], convention: _Library, library: str
) -> tuple[dict[str, np.ndarray], int]:
    """The state in float64 under this library's names, and the number of batches."""
    own = {**layer.parameters, **layer.buffers}
    expected = {theirs: ours for ours, theirs in convention.names.items() if ours in own}
    optional = {convention.count} if convention.count else set()
    missing, foreign = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys() - optional)
    if missing or foreign:
        advice = " (a layer without scale or offset: pass ones or zeros)" if missing else ""
        raise ValueError(
            f"Error(s) in loading a {library} batch norm into {type(layer).__name__}: "
            f"missing keys {missing}{advice}, unexpected keys {foreign}"
        )
    arrays = {}
    for theirs, ours in expected.items():
        value = moved(given[theirs], np)
        if value.shape != own[ours].shape:
            raise ValueError(
                f"size mismatch for {theirs}: got shape {list(value.shape)}, {ours} has {list(own[ours].shape)}"
            )
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{theirs} must be floating, got {described(value.dtype)}")
        arrays[ours] = value.astype(np.float64)
    batches = 0
    if convention.count in given:
        count = moved(given[str(convention.count)], np)
        batches = check_integer(count[()] if count.ndim == 0 else count, str(convention.count), 0, 2**63 - 1)
    return arrays, batches
