"""Cases of batch normalisation by groups of samples, of padded batches, and of a batch in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from gpu_layers import ops
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.distributed.communicator import Communicator, SingleProcess
from gpu_layers.kernels.batch_norm_plan import summation_depth
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNormLayer
from gpu_layers.layers.ghost_batch_norm import GhostBatchNorm1d
from gpu_layers.layers.sync_batch_norm import SyncBatchNorm
from gpu_layers.runtime.cuda import array_module, is_cupy_array
from gpu_layers.runtime.kernel import FLOAT_DTYPES
from gpu_layers.verification.batch_norm_bounds import batch_norm_bounds
from gpu_layers.verification.comparison import Arrays, Case
from gpu_layers.verification.inputs import normal

T = TypeVar("T")

_EPS = 1e-5
# Roundings that merging the statistics of parts adds to those of their sums: in float64, but of float32 results.
_MERGING = 8


def _inputs(shape: tuple[int, ...], dtype: Any, channels_last: bool) -> Arrays:
    channels = (shape[-1 if channels_last else 1],)
    parameters = {name: normal(channels, accumulation_dtype(dtype), name) for name in ("gamma", "beta")}
    arrays = {name: normal(shape, dtype, name, mean=2.0 * (name == "x")) for name in ("x", "dy", "residual")}
    return arrays | parameters


def _label(shape: tuple[int, ...], channels_last: bool, what: str) -> str:
    return f"{list(shape)}{', channels_last' if channels_last else ''}, {what}"


# ---- groups of samples -----------------------------------------------------------------------------------------------


def ghost_batch_norm_cases() -> Iterator[Case]:
    """Last groups that are smaller; groups that begin at any address; one group; all activations' kinds."""
    for dtype in FLOAT_DTYPES:
        yield _ghost(dtype, (7, 5, 9, 3), False, (0, 3, 6, 7), "relu")
        yield _ghost(dtype, (5, 8, 7, 16), True, (0, 2, 4, 5), None)
        yield _ghost(dtype, (5, 3, 2, 5), True, (0, 4, 5), "gelu")
        yield _ghost(dtype, (4, 6, 40), False, (0, 4), "leaky_relu")
        yield _ghost(dtype, (33, 11), False, (0, 16, 31, 33), None)
        yield _ghost(dtype, (2, 3, 61, 70), False, (0, 1, 2), "relu")


def _ghost(dtype: Any, shape: tuple[int, ...], channels_last: bool, bounds: tuple[int, ...], activation: Any) -> Case:
    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.ghost_batch_norm_forward(
            arrays["x"],
            arrays["gamma"],
            arrays["beta"],
            bounds=bounds,
            eps=_EPS,
            residual=arrays["residual"],
            activation=activation,
            channels_last=channels_last,
        )
        names = ("dx", "dgamma", "dbeta", "dresidual")
        results = dict(zip(names, ops.ghost_batch_norm_backward(arrays["dy"], saved), strict=True))
        for number, group in enumerate(saved.groups):
            results |= {f"{name} {number}": getattr(group, name) for name in ("mean", "var", "inv_std")}
        return {"y": y, **results}

    def allowed(inputs: Arrays, expected: Arrays) -> Arrays:
        options = {"channels_last": channels_last, "activation": activation}
        of_groups = _bounds_of_groups(inputs, expected, bounds, **options)
        statistics = {
            f"{name} {number}": of_group[name]
            for number, of_group in enumerate(of_groups)
            for name in ("mean", "var", "inv_std")
        }
        return {**statistics, **_joined(of_groups)}

    label = _label(shape, channels_last, f"{activation}, groups from {bounds}")
    return Case("ghost_batch_norm", dtype, label, lambda: _inputs(shape, dtype, channels_last), run, allowed)


def _bounds_of_groups(inputs: Arrays, expected: Arrays, bounds: Sequence[int], **options: Any) -> list[Arrays]:
    """Of each group, whose statistics are taken in float64."""
    of_groups = []
    for start, stop in pairwise(bounds):
        own = {name: inputs[name][start:stop] for name in ("x", "dy", "residual")}
        results = {name: expected[name][start:stop] for name in ("y", "dx", "dresidual")}
        statistics = _statistics(own["x"], options["channels_last"])
        of_groups.append(batch_norm_bounds({**inputs, **own}, {**results, **statistics}, **options))
    return of_groups


def _statistics(x: np.ndarray, channels_last: bool) -> Arrays:
    axes = tuple(axis for axis in range(x.ndim) if axis != (x.ndim - 1 if channels_last else 1))
    values = x.astype(np.float64)
    return {"mean": values.mean(axes), "inv_std": 1 / np.sqrt(values.var(axes) + _EPS)}


def _joined(of_groups: list[Arrays]) -> Arrays:
    elements = {name: np.concatenate([one[name] for one in of_groups]) for name in ("y", "dx", "dresidual")}
    # Added in float64; rounded once more, which is less than the rounding of one group's sums.
    return elements | {name: 2 * sum(one[name] for one in of_groups) for name in ("dgamma", "dbeta")}


# ---- padded batches --------------------------------------------------------------------------------------------------


def padded_batch_norm_cases() -> Iterator[Case]:
    """Lengths of one and of two axes, also with samples without valid positions; masks; also for the other variants."""
    for dtype in FLOAT_DTYPES:
        ragged, planes = [7, 0, 3, 1, 6], [[9, 5], [4, 11], [0, 3]]
        yield _padded(dtype, (5, 3, 7), False, BatchNorm1d, {"lengths": ragged}, "relu")
        yield _padded(dtype, (3, 8, 9, 11), False, BatchNorm2d, {"lengths": planes}, None)
        yield _padded(dtype, (3, 9, 11, 8), True, BatchNorm2d, {"lengths": planes}, "gelu")
        yield _padded(dtype, (3, 5, 9, 11), False, BatchNorm2d, {"mask": _holes((3, 9, 11))}, "relu")
        yield _padded(dtype, (33, 16), False, BatchNorm1d, {"mask": _holes((33,))}, None)
        yield _padded(dtype, (3, 8, 9, 11), False, BatchNorm2d, {"lengths": planes}, "gelu")
        yield _padded(dtype, (3, 9, 11, 5), True, BatchNorm2d, {"mask": _holes((3, 9, 11))}, "gelu")
        yield _padded(dtype, (3, 9, 11, 3), True, BatchNorm2d, {"lengths": planes}, "leaky_relu")
        yield _padded(dtype, (3, 9, 11, 16), True, BatchNorm2d, {"lengths": planes}, "relu")
        # Several blocks a channel.
        yield _padded(dtype, (2, 3, 61, 70), False, BatchNorm2d, {"mask": _holes((2, 61, 70))}, "relu")
        yield _padded(dtype, (2, 61, 70, 16), True, BatchNorm2d, {"lengths": [[0, 70], [61, 33]]}, None)
        yield _padded(dtype, (5, 3, 7), False, _ghost_of_two, {"lengths": ragged}, "relu")
        yield _padded(dtype, (3, 9, 11, 8), True, _sync_of_one, {"mask": _holes((3, 9, 11))}, "relu")


def _holes(shape: tuple[int, ...]) -> np.ndarray:
    return normal(shape, np.float32, "mask") > -0.5


def _ghost_of_two(channels: int, **options: Any) -> BatchNormLayer:
    return GhostBatchNorm1d(channels, 2, **options)


def _sync_of_one(channels: int, **options: Any) -> BatchNormLayer:
    return SyncBatchNorm(channels, communicator=SingleProcess(), **options)


def _padded(
    dtype: Any, shape: tuple[int, ...], channels_last: bool, make: Any, valid: dict[str, Any], activation: Any
) -> Case:
    parameters = accumulation_dtype(dtype)
    channels = shape[-1 if channels_last else 1]
    inside = _inside(shape, channels_last, valid)
    has_residual = activation is not None

    def layer(arrays: Arrays) -> BatchNormLayer:
        options = {"channels_last": channels_last, "activation": activation, "dtype": parameters}
        made: BatchNormLayer = make(channels, eps=_EPS, momentum=1.0, **options)
        made.to("cuda" if is_cupy_array(arrays["x"]) else "cpu")
        made.parameters = {"weight": arrays["gamma"], "bias": arrays["beta"]}
        made.deferred = True
        return made

    def inputs() -> Arrays:
        arrays = _inputs(shape, dtype, channels_last)
        for name in ("x", "dy", "residual"):
            # What is beyond may be anything.
            _rows(arrays[name], channels_last)[~inside] = np.nan
        return arrays

    def run(arrays: Arrays) -> Arrays:
        made, xp = layer(arrays), array_module(arrays["x"])
        own = {name: xp.asarray(value) if name == "mask" else value for name, value in valid.items()}
        residual = arrays["residual"] if has_residual else None

        def gradients(name: str) -> Arrays:
            found = made.backward(arrays["dy"])
            return dict(zip((f"{name}dx", f"{name}dresidual"), found if has_residual else (found,), strict=False))

        results = {"y": made(arrays["x"], residual, **own), **gradients("")}
        found = made.pending
        assert found is not None
        results |= {"mean": found.mean, "var": found.var}
        results |= {"dgamma": made.gradients["weight"], "dbeta": made.gradients["bias"]}
        made.eval().buffers.update(running_mean=found.mean, running_var=found.var)
        results["inference y"] = made(arrays["x"], residual, **own)
        return results | gradients("inference ")

    def allowed(inputs: Arrays, expected: Arrays) -> Arrays:
        def rows_of(arrays: Arrays, names: Sequence[str]) -> Arrays:
            return {name: _rows(arrays[name], channels_last)[inside] for name in names}

        elements = [name for name in expected if expected[name].ndim > 1]
        rows, results = {**inputs, **rows_of(inputs, ("x", "dy", "residual"))}, rows_of(expected, elements)
        if not has_residual:
            del rows["residual"]
        options = {"channels_last": True, "activation": activation}
        whole = {**results, **_statistics(rows["x"], True)}
        depth = summation_depth(shape, dtype, channels_last) + _MERGING
        of_rows = batch_norm_bounds(rows, whole, depth=depth, **options)
        if make is _ghost_of_two:
            samples = np.nonzero(inside)[0]
            starts = [int(np.searchsorted(samples, sample)) for sample in (*range(0, shape[0], 2), shape[0])]
            of_rows |= _joined(_bounds_of_groups(rows, results, starts, **options))
        return of_rows | {name: _unpacked(of_rows[name], inside, channels_last) for name in elements}

    kind = {_ghost_of_two: ", groups of 2", _sync_of_one: ", one process"}.get(make, "")
    label = _label(shape, channels_last, f"{activation}, {next(iter(valid))}{kind}")
    return Case("padded_batch_norm", dtype, label, inputs, run, allowed)


def _inside(shape: tuple[int, ...], channels_last: bool, valid: dict[str, Any]) -> np.ndarray:
    """Which positions are valid, one by one."""
    if "mask" in valid:
        mask: np.ndarray = valid["mask"]
        return mask
    spatial = shape[1:-1] if channels_last else shape[2:]
    inside = np.zeros((shape[0], *spatial), bool)
    for sample, own in enumerate(np.reshape(valid["lengths"], (shape[0], -1))):
        inside[sample][tuple(slice(size) for size in own)] = True
    return inside


def _rows(x: np.ndarray, channels_last: bool) -> np.ndarray:
    return x if channels_last else np.moveaxis(x, 1, -1)


def _unpacked(bound: np.ndarray, inside: np.ndarray, channels_last: bool) -> np.ndarray:
    """The bounds at valid positions; elsewhere 0: there is +0, to the bit."""
    whole = np.zeros((*inside.shape, bound.shape[-1]))
    whole[inside] = bound
    return whole if channels_last else np.moveaxis(whole, -1, 1)


# ---- several processes -----------------------------------------------------------------------------------------------


class _OneOf(Communicator):
    """One of several processes; what the others would send is there before."""

    def __init__(self, rank: int, sent: Sequence[Any]) -> None:
        self.rank, self.size, self._sent = rank, len(sent), sent

    def gather(self, values: Any) -> Any:
        """With the own values, as they are now, in their place."""
        parts = [*self._sent[: self.rank], values, *self._sent[self.rank + 1 :]]
        return array_module(values).stack(parts)


class _Listening(SingleProcess):
    """Records what is sent, and answers as if a second process had sent the same."""

    size = 2

    def __init__(self) -> None:
        self.heard: Any = None

    def gather(self, values: Any) -> Any:
        """Twice the values."""
        self.heard = values
        return array_module(values).stack([values, values])


def sync_batch_norm_cases() -> Iterator[Case]:
    """One process, and several one after the other, with unequal parts, some of them empty."""
    for dtype in FLOAT_DTYPES:
        yield _sync(dtype, (6, 5, 9, 11), False, (0, 6), "relu")
        yield _sync(dtype, (7, 5, 9, 11), False, (0, 4, 4, 7), "relu")
        yield _sync(dtype, (5, 9, 7, 16), True, (0, 1, 5), "gelu")
        yield _sync(dtype, (5, 9, 7, 3), True, (0, 2, 5), None)
        yield _sync(dtype, (9, 21), False, (0, 1, 6, 9), "leaky_relu")


def _sync(dtype: Any, shape: tuple[int, ...], channels_last: bool, bounds: tuple[int, ...], activation: Any) -> Case:
    parts = [slice(start, stop) for start, stop in pairwise(bounds)]
    of_statistics, of_elements = ("mean", "var", "inv_std"), ("y", "dx", "dresidual")

    def run(arrays: Arrays) -> Arrays:
        def forward(rank: int, communicator: Communicator) -> tuple[Any, Any]:
            return ops.sync_batch_norm_forward(
                arrays["x"][parts[rank]],
                arrays["gamma"],
                arrays["beta"],
                communicator,
                eps=_EPS,
                residual=arrays["residual"][parts[rank]],
                activation=activation,
                channels_last=channels_last,
            )

        forwards = _exchanged(forward, len(parts))

        def backward(rank: int, communicator: Communicator) -> tuple[Any, ...]:
            saved = replace(forwards[rank][1], communicator=communicator)
            return ops.sync_batch_norm_backward(arrays["dy"][parts[rank]], saved)

        results: Arrays = {}
        for rank, gradients in enumerate(_exchanged(backward, len(parts))):
            y, saved = forwards[rank]
            named = dict(zip(("y", "dx", "dgamma", "dbeta", "dresidual"), (y, *gradients), strict=True))
            named |= {name: getattr(saved.local, name) for name in of_statistics}
            results |= {f"{name} {rank}": result for name, result in named.items()}
        return results

    def allowed(inputs: Arrays, expected: Arrays) -> Arrays:
        depth = _MERGING + max(
            summation_depth((part.stop - part.start, *shape[1:]), dtype, channels_last)
            for part in parts
            if part.stop > part.start
        )
        ranks = range(len(parts))
        whole = {name: np.concatenate([expected[f"{name} {rank}"] for rank in ranks]) for name in of_elements}
        whole |= _statistics(inputs["x"], channels_last)
        of_whole = batch_norm_bounds(inputs, whole, channels_last=channels_last, activation=activation, depth=depth)
        # Sums over a part are smaller than those over everything, and so are their errors.
        return {
            f"{name} {rank}": bound[parts[rank]] if name in of_elements else bound
            for name, bound in of_whole.items()
            for rank in ranks
        }

    label = _label(shape, channels_last, f"{activation}, parts from {bounds}")
    return Case("sync_batch_norm", dtype, label, lambda: _inputs(shape, dtype, channels_last), run, allowed)


def _exchanged(run: Callable[[int, Communicator], T], count: int) -> list[T]:
    """What each of several processes gets: all are run for what they send, and again with what all have sent."""
    sent = []
    for rank in range(count):
        listening = _Listening()
        run(rank, listening)
        sent.append(listening.heard)
    return [run(rank, _OneOf(rank, sent)) for rank in range(count)]
