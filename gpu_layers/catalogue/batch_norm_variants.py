"""Batch normalisation by groups of samples, of padded batches, and of a batch in several processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from gpu_layers import layers, ops
from gpu_layers.catalogue.batch_norm import KEPT, READ, batch_norm_floor, batch_norm_torch, reads_of
from gpu_layers.catalogue.batch_norm_bounds import batch_norm_bounds
from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.catalogue.inputs import normal
from gpu_layers.catalogue.operation import (
    BACKWARD,
    FORWARD,
    LARGE_IMAGES,
    SMALL_IMAGES,
    SMALL_ROWS,
    Called,
    LayerExample,
    Operation,
    Shape,
    Sizes,
    of_ranks,
    per_pass,
)
from gpu_layers.catalogue.traffic import Prepared, TrafficCase, in_layout, passes
from gpu_layers.core.array import Array, ArrayLike, Options
from gpu_layers.core.cuda import array_module, is_cupy_array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.running import RunningStatistics
from gpu_layers.distributed.communicator import Communicator, SingleProcess
from gpu_layers.kernels.batch_norm_plan import summation_depth
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNormLayer
from gpu_layers.layers.ghost_batch_norm import GhostBatchNorm1d
from gpu_layers.layers.sync_batch_norm import SyncBatchNorm
from gpu_layers.ops.batch_norm import checked_forward
from gpu_layers.ops.padding import valid_positions
from gpu_layers.runtime.backend import backend_for
from gpu_layers.runtime.kernel import FLOAT_DTYPES

#: The page of the documents that has these operations.
PAGE = "batch_norm"

T = TypeVar("T")

_EPS = 1e-5
# Roundings that merging the statistics of parts adds to those of their sums: in float64, but of float32 results.
_MERGING = 8


def _inputs(shape: tuple[int, ...], dtype: np.dtype, channels_last: bool) -> Arrays:
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


def _ghost(
    dtype: np.dtype, shape: tuple[int, ...], channels_last: bool, bounds: tuple[int, ...], activation: str | None
) -> Case:
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
        yield _padded(dtype, (3, 9, 11, 5), True, BatchNorm2d, {"mask": _holes((3, 9, 11))}, None)
        yield _padded(dtype, (3, 9, 11, 3), True, BatchNorm2d, {"lengths": planes}, "leaky_relu")
        yield _padded(dtype, (3, 9, 11, 16), True, BatchNorm2d, {"lengths": planes}, "relu")
        # Several blocks a channel.
        yield _padded(dtype, (2, 3, 61, 70), False, BatchNorm2d, {"mask": _holes((2, 61, 70))}, "relu")
        yield _padded(dtype, (2, 61, 70, 16), True, BatchNorm2d, {"lengths": [[0, 70], [61, 33]]}, None)
        # Lengths by tens and by hundreds, which come to the GPU in other ways.
        for samples in (40, 260):
            many = [(5 * sample) % 8 for sample in range(samples)]
            yield _padded(dtype, (samples, 2, 7), False, BatchNorm1d, {"lengths": many}, "relu")
        yield _padded(dtype, (5, 3, 7), False, _ghost_of_two, {"lengths": ragged}, "relu")
        yield _padded(dtype, (3, 9, 11, 8), True, _sync_of_one, {"mask": _holes((3, 9, 11))}, "relu")


def _holes(shape: tuple[int, ...]) -> np.ndarray:
    return normal(shape, np.float32, "mask") > -0.5


def _ghost_of_two(channels: int, **options: Any) -> BatchNormLayer:
    return GhostBatchNorm1d(channels, 2, **options)


def _sync_of_one(channels: int, **options: Any) -> BatchNormLayer:
    return SyncBatchNorm(channels, communicator=SingleProcess(), **options)


def _padded(
    dtype: np.dtype, shape: tuple[int, ...], channels_last: bool, make: Any, valid: Arrays, activation: str | None
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
        options: Options = {"channels_last": True, "activation": activation}
        whole = {**results, **_statistics(rows["x"], True)}
        depth = summation_depth(shape, dtype, channels_last, padded=True) + _MERGING
        of_rows = batch_norm_bounds(rows, whole, depth=depth, **options)
        if make is _ghost_of_two:
            samples = np.nonzero(inside)[0]
            starts = [int(np.searchsorted(samples, sample)) for sample in (*range(0, shape[0], 2), shape[0])]
            of_rows |= _joined(_bounds_of_groups(rows, results, starts, **options))
        return of_rows | {name: _unpacked(of_rows[name], inside, channels_last) for name in elements}

    kind = {_ghost_of_two: ", groups of 2", _sync_of_one: ", one process"}.get(make, "")
    label = _label(shape, channels_last, f"{activation}, {next(iter(valid))}{kind}")
    return Case("padded_batch_norm", dtype, label, inputs, run, allowed)


def _inside(shape: tuple[int, ...], channels_last: bool, valid: Options) -> np.ndarray:
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

    def __init__(self, rank: int, sent: Sequence[Array]) -> None:
        self.rank, self.size, self._sent = rank, len(sent), sent

    def gather(self, values: Array) -> Array:
        """With the own values, as they are now, in their place."""
        parts = [*self._sent[: self.rank], values, *self._sent[self.rank + 1 :]]
        return array_module(values).stack(parts)


class _Listening(SingleProcess):
    """One of two processes: records what is sent, and answers as if the other had sent the same."""

    size = 2

    def __init__(self) -> None:
        self.heard: Array = None

    def gather(self, values: Array) -> Array:
        """Twice the values."""
        self.heard = values
        answer = array_module(values).empty((2, *values.shape), values.dtype)
        answer[...] = values
        return answer


def sync_batch_norm_cases() -> Iterator[Case]:
    """One process, and several one after the other, with unequal parts, some of them empty; what they tell."""
    yield from (_merging(np.dtype(name)) for name in ("float32", "float64"))
    for dtype in FLOAT_DTYPES:
        yield _sync(dtype, (6, 5, 9, 11), False, (0, 6), "relu")
        yield _sync(dtype, (7, 5, 9, 11), False, (0, 4, 4, 7), "relu")
        yield _sync(dtype, (5, 9, 7, 16), True, (0, 1, 5), "gelu")
        yield _sync(dtype, (5, 9, 7, 3), True, (0, 2, 5), None)
        yield _sync(dtype, (9, 21), False, (0, 1, 6, 9), "leaky_relu")


def _sync(
    dtype: np.dtype, shape: tuple[int, ...], channels_last: bool, bounds: tuple[int, ...], activation: str | None
) -> Case:
    parts = [slice(start, stop) for start, stop in pairwise(bounds)]
    of_statistics, of_elements = ("mean", "var", "inv_std"), ("y", "dx", "dresidual")

    def run(arrays: Arrays) -> Arrays:
        def forward(rank: int, communicator: Communicator) -> tuple[Array, Any]:
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

        def backward(rank: int, communicator: Communicator) -> tuple[Array, ...]:
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


# Values of parts: numbers that the host knows (a kernel is told two or all of them); and what the device alone knows.
_COUNTS = ((7,), (5, 5, 5, 2), (0, 4, 0, 3), (0, 0))


def _merging(dtype: np.dtype) -> Case:
    """Statistics of parts, of fewer and of more channels than a block has threads, merged and folded in: every bit."""

    def inputs() -> Arrays:
        arrays: Arrays = {f"counts {counts}": np.array(counts, np.float64) for counts in _COUNTS}
        for channels in (5, 300):
            # Between parts lies memory that holds none of their statistics.
            arrays |= {f"parts {channels}": abs(normal((4, 2 * channels + 3), dtype, "parts", mean=3.0))}
            arrays |= {f"mean {channels}": normal((channels,), dtype), f"var {channels}": np.full(channels, 3, dtype)}
        return arrays | {"batches": np.array(2)}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for channels, counts, is_told, folds in itertools.product((5, 300), _COUNTS, (False, True), (False, True)):
            parts = arrays[f"parts {channels}"][: len(counts)]
            mean, var, batches = (arrays[name].copy() for name in (f"mean {channels}", f"var {channels}", "batches"))
            statistics, count = backend_for(parts).batch_norm_merge_parts(
                parts,
                arrays[f"counts {counts}"] if is_told else counts,
                channels,
                RunningStatistics(mean, var, batches, 0.3, 0) if folds else None,
            )
            of_all = {"mean": mean, "var": var, "batches": batches, "statistics": statistics}
            of_all["count"] = array_module(parts).asarray(count)
            results |= {f"{of} of {channels}, {counts}, {is_told=}, {folds=}": array for of, array in of_all.items()}
        return results

    return Case("sync_batch_norm", dtype, "parts merged", inputs, run)


def _exchanged(run: Callable[[int, Communicator], T], count: int) -> list[T]:
    """What each of several processes gets: all are run for what they send, and again with what all have sent."""
    sent = []
    for rank in range(count):
        listening = _Listening()
        run(rank, listening)
        sent.append(listening.heard)
    return [run(rank, _OneOf(rank, sent)) for rank in range(count)]


# ---- what is timed, and whose bytes are counted ----------------------------------------------------------------------

# Samples of a group, but for the last one: 64, 128 and 32 samples are 3, 6 and 2 groups.
_GROUP = 24


def _groups(samples: int) -> tuple[int, ...]:
    size = max(1, min(_GROUP, samples - 1))
    return (*range(0, samples, size), samples)


def _ghost_floor(s: Sizes, direction: str, bounds: tuple[int, ...] = (), by_plan: bool = False) -> int:
    """Groups of samples: a batch of its own each. ``by_plan``: read as often as plans say; without gamma and beta."""
    total = 0
    for start, stop in pairwise(bounds or _groups(s.shape[0])):
        elements = (stop - start) * (s.inputs // s.shape[0])
        group = replace(s, inputs=elements, outputs=elements, shape=(stop - start, *s.shape[1:]))
        reads = reads_of(group, direction) if by_plan else 1
        total += batch_norm_floor(group, direction, reads=reads, affine=not by_plan)
    return total


def _ghost_call(a: Arrays, channels_last: bool, bounds: tuple[int, ...]) -> Called:
    options: Options = {"bounds": bounds, "eps": _EPS, "channels_last": channels_last}
    return ops.ghost_batch_norm_forward(a["x"], a.get("gamma"), a.get("beta"), **options)


def _ghost_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    """Groups of samples with a smaller last one."""
    images, of_images, of_rows = (8, 32, 28, 28), (0, 3, 6, 8), (0, 100, 200, 256)
    for shape, layout, bounds in (
        (images, "NCHW", of_images),
        (images, "NHWC", of_images),
        ((256, 512), "flat", of_rows),
    ):
        yield from passes(
            operation,
            "ghost batch_norm",
            dtype,
            shape,
            layout,
            forward=lambda x, call=(layout == "NHWC", bounds): _ghost_call({"x": x}, *call),
            floor=lambda s, direction, saved, bounds=bounds: _ghost_floor(s, direction, bounds, by_plan=True),
        )


GHOST_BATCH_NORM = Operation(
    name="ghost_batch_norm",
    shapes=(LARGE_IMAGES[0], *SMALL_IMAGES),
    forward=lambda a, last: _ghost_call(a, last, _groups(len(a["x"]))),
    backward=ops.ghost_batch_norm_backward,
    floor=_ghost_floor,
    # In chunks, whose results a copy puts together.
    torch_bytes=per_pass(lambda s: s.elements(3 + 2), lambda s: s.elements(5 + 2)),
    cases=(ghost_batch_norm_cases,),
    traffic=_ghost_traffic,
    layers=of_ranks(layers.GhostBatchNorm1d, layers.GhostBatchNorm2d, layers.GhostBatchNorm3d, arguments=(4, 2)),
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)


def _sync_floor(s: Sizes, direction: str, *, residual: bool = False, affine: bool = True) -> int:
    """One of several processes: what it kept is lost in the exchange, which the statistics stand on both sides of.

    So each input is read twice whatever its size; the statistics do not need the residual. What is exchanged is not
    counted; what kernels then read of two processes is.
    """
    inputs = 2 if residual else 1
    if direction == FORWARD:
        return s.elements(2 + inputs) + (KEPT + 2 * 2 + 2 * affine + KEPT) * s.statistic
    return s.elements(2 * (1 + inputs) + inputs) + 2 * (READ + 2) * s.statistic


def _sync_call(a: Arrays, channels_last: bool, **fused: object) -> Called:
    options: Options = {"eps": _EPS, "channels_last": channels_last, **fused}
    return ops.sync_batch_norm_forward(a["x"], a.get("gamma"), a.get("beta"), _Listening(), **options)


def _sync_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    images = itertools.product(((2, 16, 112, 112), (4, 32, 28, 28)), ("NCHW", "NHWC"))
    for (shape, layout), summed in itertools.product((*images, ((64, 1000), "flat")), (False, True)):
        residual = in_layout(shape, dtype, layout, "residual") if summed else None
        fused = {"residual": residual, "activation": "relu"} if summed else {}
        yield from passes(
            operation,
            f"sync batch_norm{' sum relu' if summed else ''}",
            dtype,
            shape,
            layout,
            forward=lambda x, last=layout == "NHWC", fused=fused: _sync_call({"x": x}, last, **fused),
            floor=lambda s, direction, saved, summed=summed: _sync_floor(s, direction, residual=summed, affine=False),
            # Of 64 rows each number of a channel is half a percent, and what is merged is written and read again.
            limit=1.06,
        )


SYNC_BATCH_NORM = Operation(
    name="sync_batch_norm",
    shapes=(LARGE_IMAGES[0], *SMALL_IMAGES, *SMALL_ROWS),
    forward=_sync_call,
    backward=ops.sync_batch_norm_backward,
    # All of one process's work.
    floor=_sync_floor,
    torch_bytes=_sync_floor,
    cases=(sync_batch_norm_cases,),
    traffic=_sync_traffic,
    layers=(LayerExample(layers.SyncBatchNorm, (4,), axes=3),),
    # What PyTorch's SyncBatchNorm runs where there is one process.
    torch=batch_norm_torch,
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)


@cache
def _told(module: ModuleType, channels: int, dtype: np.dtype) -> tuple[Array, Array]:
    """As large as what a process tells in the forward, and in the backward."""
    return module.zeros(2 * channels * dtype.itemsize // 8 + 1), module.zeros((2, channels), dtype)


def _exchange_call(a: Arrays, channels_last: bool) -> Called:
    of_forward, of_backward = _told(array_module(a["gamma"]), a["gamma"].size, a["gamma"].dtype)
    return _Listening().gather(of_forward), of_backward


def exchange_operation() -> Operation:
    """What stands in for another process where SYNC_BATCH_NORM is timed, alone: no time of ours."""
    return replace(
        SYNC_BATCH_NORM,
        name="sync_batch_norm exchange",
        forward=_exchange_call,
        backward=lambda dy, told: _Listening().gather(told),
        torch=None,
    )


_INDEX_BYTES = 8


def _padded_floor(s: Sizes, direction: str, valid: int | None = None, *, reads: int = 1, affine: bool = True) -> int:
    """``valid`` elements of the inputs (three quarters by default), as often as the plan says, and all of the outputs,
    whose padding is to be 0. The bits that say what is valid are not in it."""
    arrays = reads if direction == FORWARD else 2 * reads
    numbers = KEPT + 2 * affine if direction == FORWARD else READ + 2
    return s.itemsize * arrays * (3 * s.inputs // 4 if valid is None else valid) + s.elements(1) + numbers * s.statistic


def _packing_bytes(s: Sizes, direction: str, rows: int, positions: int) -> int:
    """What an array library moves that packs and unpacks so many valid rows, whose positions have so many numbers.

    Each of its operations reads its arguments once and writes its result once: a forward finds the valid positions by a
    mask, which is written and read; each pass gathers an array, and fills another with zeros and scatters to it.
    """
    index, valid = _INDEX_BYTES * positions * rows, s.itemsize * rows * s.shape[1]
    finding = 2 * s.positions + index if direction == FORWARD else 0
    return finding + (index + 2 * valid) + (index + s.elements(1) + 2 * valid)


def _padded_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    # Of planes of 28 columns half a row is no whole number of sectors.
    images, halved, squares = (4, 32, 28, 28), [[28, 28], [14, 28]], [[28, 28]]
    ragged = [[256 - 8 * sample] for sample in range(16)]
    for (shape, layout, lengths), direction in itertools.product(
        (
            (images, "NCHW", [*halved, [14, 28], *squares]),
            (images, "NHWC", [*halved, [28, 14], *squares]),
            ((16, 40, 256), "NCHW", ragged),
        ),
        (FORWARD, BACKWARD),
    ):
        sizes = Sizes(math.prod(shape), math.prod(shape), dtype.itemsize, shape)
        valid = sum(math.prod(own) for own in lengths) * shape[1]
        reads = reads_of(replace(sizes, channels_last=layout == "NHWC"), direction)
        floor = _padded_floor(sizes, direction, valid, reads=reads, affine=False)
        prepare = partial(_padded_pass, dtype, shape, layout, lengths, direction, floor)
        yield TrafficCase(f"padded batch_norm {direction}", dtype, shape, layout, prepare)


def _padded_pass(
    dtype: np.dtype, shape: Shape, layout: str, lengths: ArrayLike, direction: str, floor: int
) -> Prepared:
    x, kind = in_layout(shape, dtype, layout), BatchNorm2d if len(shape) == 4 else BatchNorm1d
    options: Options = {"channels_last": layout == "NHWC", "dtype": accumulation_dtype(dtype)}
    layer = kind(shape[1], affine=False, track_running_stats=False, **options)
    if direction == FORWARD:
        return lambda: layer(x, lengths=lengths), floor
    layer(x, lengths=lengths)
    return lambda: layer.backward(x), floor


@lru_cache
def _lengths(shape: Shape, channels_last: bool) -> np.ndarray:
    """Every other sample has all rows, the others half of them: three quarters are valid."""
    rows, columns = shape[1:3] if channels_last else shape[2:]
    return np.array([(rows // 2 if sample % 2 else rows, columns) for sample in range(shape[0])])


def _valid_part(shape: Shape) -> float:
    """What part of a padded batch is valid."""
    samples, rows, columns = shape[0], *shape[2:]
    return _lengths(shape, False).prod(1).sum() / (samples * rows * columns)


def _padded_forward(arrays: Arrays, channels_last: bool) -> tuple[Array, ops.BatchNormSaved]:
    """What a layer does with lengths."""
    x = arrays["x"]
    valid = valid_positions(x, _lengths(x.shape, channels_last), None, channels_last)
    given = (x, arrays["gamma"], arrays["beta"], _EPS, None, "identity", channels_last, None, None, valid)
    return checked_forward(backend_for(x), *given)


def _three_quarters(s: Sizes, direction: str) -> int:
    return _packing_bytes(s, direction, 3 * s.positions // 4, 3)


PADDED_BATCH_NORM = Operation(
    name="padded_batch_norm",
    shapes=(LARGE_IMAGES[0], SMALL_IMAGES[0]),
    forward=_padded_forward,
    backward=ops.batch_norm_backward,
    floor=_padded_floor,
    kept=_valid_part,
    # Its batch norm is one of rows, into which valid values are packed, and from which they are unpacked.
    torch_bytes=lambda s, direction: (
        _three_quarters(s, direction) + s.elements(3 * (3 if direction == FORWARD else 5)) // 4
    ),
    cases=(padded_batch_norm_cases,),
    traffic=_padded_traffic,
    layouts=(False, True),
    per_channel=("gamma", "beta"),
    independent="channels",
)
