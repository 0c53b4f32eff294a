"""The dropout family. Of every case each bit must be the reference's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from gpu_layers import layers, ops
from gpu_layers.catalogue.case import Arrays, Case
from gpu_layers.catalogue.inputs import ELEMENTWISE_SIZES, normal, with_special_values
from gpu_layers.catalogue.operation import (
    FORWARD,
    IMAGES,
    LARGE_IMAGES,
    LARGE_ROWS,
    SINGLE_IMAGE,
    SMALL_IMAGES,
    SMALL_ROWS,
    LayerExample,
    Operation,
    Shape,
    Sizes,
    of_ranks,
    per_pass,
)
from gpu_layers.catalogue.traffic import Prepared, TrafficCase, passes
from gpu_layers.core.array import Array
from gpu_layers.core.cuda import array_module
from gpu_layers.core.philox import random_words, sample_seed, sample_words
from gpu_layers.runtime.backend import backend_for, use_backend
from gpu_layers.runtime.kernel import FLOAT_DTYPES

#: The page of the documents that has these operations.
PAGE = "dropout"

_SEED, _OFFSET = 0x0123456789ABCDEF, 0xFEDCBA9876543210


def _starting_at(*starts: int) -> Callable[[Callable[[np.dtype, int], Case]], Callable[[], Iterator[Case]]]:
    """Of a case of a dtype and of the number of its first decision: one of each dtype from each start."""
    return lambda make: lambda: (make(dtype, start) for dtype in FLOAT_DTYPES for start in starts)


def dropout_cases() -> Iterator[Case]:
    """Sizes, probabilities, shards and views."""
    for dtype in FLOAT_DTYPES:
        for size in ELEMENTWISE_SIZES:
            yield _dropout(dtype, f"n={size}", (size,), 0.3)
        for p in (0.0, 2.0**-32, 0.999999999, 1.0):
            yield _dropout(dtype, f"p={p}", (301,), p)
        # A shard may start at any element: at a multiple of 4 (one Philox block), or within a block.
        for start in (4, 2**34 - 8, 2**33 + 1, 2**34 - 6, 2**63 + 3):
            yield _dropout(dtype, f"start={start}", (301,), 0.5, start=start)
        yield _dropout(dtype, "non-contiguous", (7, 9, 11), 0.5, view=lambda x: x[::-1, :, ::2])
        yield _dropout(dtype, "transposed", (5, 70), 0.5, view=lambda x: x.T)
        yield _dropout(dtype, "misaligned", (131,), 0.5, view=lambda x: x[1:])
        yield _dropout(dtype, "0-d", (), 0.5)
        yield _dropout(dtype, "empty", (0, 5), 0.5)
        yield _at_words(dtype)
        yield _at_extreme_words(dtype)
        yield _moments(dtype)


def _dropout(
    dtype: np.dtype,
    label: str,
    shape: tuple[int, ...],
    p: float,
    *,
    start: int = 0,
    view: Callable[[Array], Array] = lambda x: x,
) -> Case:
    def inputs() -> Arrays:
        return {"x": with_special_values(normal(shape, dtype)), "dy": normal(shape, dtype, "dy")}

    def run(arrays: Arrays) -> Arrays:
        y, saved = ops.dropout_forward(view(arrays["x"]), p, _SEED, _OFFSET, start=start)
        dx = ops.dropout_backward(view(arrays["dy"]), saved)
        # The kernel takes four at a time, and one.
        mean, variance = ops.dropout_moments(view(arrays["x"]), p, _SEED, _OFFSET, passes=5, start=start)
        in_place = view(arrays["x"].copy())
        ops.dropout_forward(in_place, p, _SEED, _OFFSET, start=start, out=in_place)
        return {"y": y, "dx": dx, "in place": in_place.copy(), "mean": mean, "variance": variance}

    return Case("dropout", dtype, label, inputs, run)


def _moments(dtype: np.dtype) -> Case:
    """Calls whose numbers need a word more, or all bits; more than are looked up; nothing that is dropped."""
    sizes, offsets = (1400, 2048), (2**32 - 3, 2**64 - 3)

    def inputs() -> Arrays:
        return {str(size): with_special_values(normal((size,), dtype)) for size in sizes}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}

        def take(label: str, x: Array, *of: Any, **options: Any) -> None:
            mean, variance = ops.dropout_moments(x, *of, **options)
            results.update({f"mean {label}": mean, f"variance {label}": variance})

        for size in sizes:
            for start in (0, 2**34 - 516):
                for offset in offsets:
                    take(f"{size}, {start}, {offset}", arrays[str(size)], 0.4, _SEED, offset, passes=7, start=start)
        for p, count in ((0.4, 300), (0.0, 3), (1.0, 3)):
            take(f"{p}, {count}", arrays["1400"][:36], p, _SEED, _OFFSET, passes=count)
        return results

    return Case("dropout", dtype, "moments", inputs, run)


def around(word: int) -> tuple[float, float]:
    """The largest p with which this word keeps, and the smallest with which it drops."""
    return word / 2**32, (word + 1) / 2**32


def _on_both_sides(name: str, word: Array, x: Array, of: tuple[int, int] = (_SEED, _OFFSET), **options: Any) -> Arrays:
    results: Arrays = {}
    for side, p in zip(("kept", "dropped"), around(int(word)), strict=True):
        y, saved = ops.dropout_forward(x, p, *of, **options)
        results |= {f"y {name}, {side}": y, f"dx {name}, {side}": ops.dropout_backward(x, saved)}
        if "mask_axes" not in options:
            moments = ops.dropout_moments(x, p, *of, passes=1, **options)
            results |= dict(zip((f"mean {name}, {side}", f"variance {name}, {side}"), moments, strict=True))
    return results


def _at_words(dtype: np.dtype) -> Case:
    """Probabilities at the very words that decide, in every kernel: one keeps the element, the next one drops it."""
    # Of each array an element in its vectors, and the last.
    shape, rows, runs = (37,), (3, 8), (3, 11, 7, 7)
    ids = np.array([3, -1, 2**62], np.int64)

    def inputs() -> Arrays:
        return {name: normal(of, dtype) for name, of in (("x", shape), ("rows", rows), ("runs", runs))} | {"ids": ids}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for start, place in itertools.product((0, 3), (5, -1)):
            name = f"{place} from {start}"
            word = random_words(_SEED, _OFFSET, start, 37)[place]
            results |= _on_both_sides(f"elements, {name}", word, arrays["x"], start=start)
            word = sample_words(_SEED, _OFFSET, ids, start, 8)[place // 8, place]
            of_rows = {"start": start, "sample_ids": arrays["ids"]}
            results |= _on_both_sides(f"samples, {name}", word, arrays["rows"], **of_rows)
            word = random_words(_SEED, _OFFSET, start, 33)[place]
            results |= _on_both_sides(f"channels, {name}", word, arrays["runs"], start=start, mask_axes=2)
        return results

    return Case("dropout", dtype, "p at a word", inputs, run)


#: Numbers of a call, and of its elements those whose words are the smallest and the largest.
EXTREME = (20261129, 1)
EXTREME_WORDS = {2926279597: 0, 140096785: 2**32 - 1}


def _at_extreme_words(dtype: np.dtype) -> Case:
    """p = 0 drops not even a word of 0, p = 1 drops the largest too; and the next probabilities to either."""

    def inputs() -> Arrays:
        return {"x": normal((37,), dtype), "runs": normal((3, 11, 7, 7), dtype)}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for (element, word), place in itertools.product(EXTREME_WORDS.items(), (5, 36)):
            name, start = f"{word} at {place}", element - place
            results |= _on_both_sides(f"elements, {name}", word, arrays["x"], EXTREME, start=start)
            start = element - min(place, 32)
            results |= _on_both_sides(f"channels, {name}", word, arrays["runs"], EXTREME, start=start, mask_axes=2)
        return results

    return Case("dropout", dtype, "p at the extreme words", inputs, run)


# Shape and axes of the mask: runs of 2, of less than a vector, of an odd number of elements, of whole vectors, of more
# than the 4,096 elements of a half-type block; one run in all; a mask over all axes by way of a spatial axis of 1.
_RUNS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((3, 67, 2), 2),
    ((5, 33, 3), 2),
    ((2, 41, 7), 2),
    ((3, 11, 7, 7), 2),
    ((2, 9, 4, 8), 2),
    ((3, 2, 5003), 2),
    ((7, 3, 29), 1),
    ((1, 37), 1),
    ((41, 5, 1), 2),
    ((2, 0, 3), 2),
)


def channel_dropout_cases() -> Iterator[Case]:
    """Masks that channels or samples share, at the start of the whole array and within."""
    for dtype in FLOAT_DTYPES:
        for start in (0, 2**33 + 3, 2**34 - 6):
            yield _channel_dropout("channel_dropout", dtype, start, ops.dropout_forward)


# Shape and axes that share: steps of time, of whole vectors and not; the batch; the batch and the plane; runs of less
# than a vector; three times in turn; all; none; nothing; more steps, and axes, than a thread takes, of whole vectors.
_SHARED: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((3, 5, 16), (1,)),
    ((3, 70, 7), (-2,)),
    ((9, 40), (0,)),
    ((4, 11, 3, 5), (0, 2, 3)),
    ((4, 5, 6, 2), (1, 3)),
    ((2, 3, 2, 3, 2, 3), (0, 2, 4)),
    ((5, 7), (0, 1)),
    ((5, 7), ()),
    ((3, 0, 4), (1,)),
    ((3, 19, 16), (1,)),
    ((3, 2, 11, 2, 24), (0, 2)),
)


@_starting_at(0, 2**33 + 3)
def shared_dropout_cases(dtype: np.dtype, start: int) -> Case:
    """Masks that elements share along any axes."""

    def inputs() -> Arrays:
        return {str(list(shape)): with_special_values(normal(shape, dtype)) for shape, _ in _SHARED}

    def run(arrays: Arrays) -> Arrays:
        results = {}
        for shape, axes in _SHARED:
            x = arrays[str(list(shape))]
            of_call: dict[str, Any] = {"start": start, "shared_axes": axes}
            for name, forward in (("dropout", ops.dropout_forward), ("alpha", ops.alpha_dropout_forward)):
                y, saved = forward(x, 0.4, _SEED, _OFFSET, **of_call)
                results[f"{name} y {list(shape)} {axes}"] = y
                results[f"{name} dx {list(shape)} {axes}"] = ops.dropout_backward(x, saved)
        return results

    return Case("shared_dropout", dtype, f"start={start}", inputs, run)


def alpha_dropout_cases() -> Iterator[Case]:
    """Dropped elements that are not 0, by elements and by channels."""
    for dtype in FLOAT_DTYPES:
        yield _channel_dropout("alpha_dropout", dtype, 0, ops.alpha_dropout_forward)
        yield _channel_dropout("alpha_dropout", dtype, 5, ops.alpha_dropout_forward)


def _channel_dropout(op: str, dtype: np.dtype, start: int, forward: Callable[..., Any]) -> Case:
    def inputs() -> Arrays:
        shapes = {str(list(shape)): shape for shape, _ in _RUNS}
        return {name: with_special_values(normal(shape, dtype)) for name, shape in shapes.items()}

    def run(arrays: Arrays) -> Arrays:
        results = {}
        for (shape, axes), p in zip(_RUNS, (0.3, 0.5, 0.7, 0.0, 1.0) * 2, strict=True):
            x = arrays[str(list(shape))]
            for mask_axes in (axes, None):
                y, saved = forward(x, p, _SEED, _OFFSET, start=start, mask_axes=mask_axes)
                results[f"y {list(shape)} by {mask_axes}"] = y
                results[f"dx {list(shape)} by {mask_axes}"] = ops.dropout_backward(x, saved)
                in_place = x.copy()
                forward(in_place, p, _SEED, _OFFSET, start=start, mask_axes=mask_axes, out=in_place)
                results[f"in place {list(shape)} by {mask_axes}"] = in_place
        return results

    return Case(op, dtype, f"start={start}", inputs, run)


# (N, *spatial, C): whole vectors of every dtype, and other numbers of channels; positions that are a multiple of 4, and
# others; one position, one channel.
_LAST: tuple[tuple[int, ...], ...] = (
    (3, 4, 5, 16),
    (2, 3, 7, 40),
    (3, 9, 5),
    (2, 3, 8),
    (5, 1, 24),
    (5, 24),
    (2, 37, 1),
    (2, 260, 16),
    (0, 4, 8),
)


@_starting_at(0, 2**33 + 3)
def channels_last_dropout_cases(dtype: np.dtype, start: int) -> Case:
    """Masks that do not depend on the layout, over elements, channels and samples; with a residual; alpha dropout."""

    def inputs() -> Arrays:
        return {str(list(shape)): with_special_values(normal(shape, dtype)) for shape in _LAST}

    def run(arrays: Arrays) -> Arrays:
        results = {}
        for (name, x), p in zip(arrays.items(), (0.3, 0.5, 0.7, 0.0, 1.0) * 2, strict=False):
            for axes in (None, 2, 1):
                of_call: dict[str, Any] = {"start": start, "mask_axes": axes, "channels_last": True}
                for kind, forward in (("", ops.dropout_forward), ("alpha ", ops.alpha_dropout_forward)):
                    y, saved = forward(x, p, _SEED, _OFFSET, **of_call)
                    results[f"{kind}y {name} by {axes}"] = y
                    results[f"{kind}dx {name} by {axes}"] = ops.dropout_backward(x, saved)
            in_place, of_call = x.copy(), {"start": start, "channels_last": True}
            ops.dropout_forward(in_place, p, _SEED, _OFFSET, residual=x[..., ::-1], out=in_place, **of_call)
            results[f"in place {name}"] = in_place
        return results

    return Case("dropout_last", dtype, f"start={start}", inputs, run)


@_starting_at(0, 2**33 + 3)
def residual_dropout_cases(dtype: np.dtype, start: int) -> Case:
    """A residual that is added, of whole vectors and not, at the start of the whole array and within."""
    shapes = ((4, 64), (3, 37), (1,), (9001,), (0, 3))

    def inputs() -> Arrays:
        given = {f"x {list(shape)}": with_special_values(normal(shape, dtype)) for shape in shapes}
        return given | {f"r {list(shape)}": normal(shape, dtype, "r") for shape in shapes}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for shape, p in zip(shapes, (0.3, 0.5, 0.7, 0.0, 1.0), strict=True):
            x, residual = (arrays[f"{name} {list(shape)}"] for name in "xr")
            y, _ = ops.dropout_forward(x, p, _SEED, _OFFSET, start=start, residual=residual)
            into_residual = residual.copy()
            ops.dropout_forward(x, p, _SEED, _OFFSET, start=start, residual=into_residual, out=into_residual)
            results |= {f"y {list(shape)}": y, f"in place {list(shape)}": into_residual}
        return results

    return Case("residual_dropout", dtype, f"start={start}", inputs, run)


@_starting_at(0, 8, 6, 2**34 - 3)
def sample_dropout_cases(dtype: np.dtype, start: int) -> Case:
    """Rows with masks of their own: of whole vectors, of other lengths, of one element, of more than a block."""
    shapes = ((5, 64), (7, 3, 4), (6, 2), (4, 37), (9, 1), (2, 2501), (8,), (0, 4), (3, 0))
    ids = np.array([0, -1, 2**63 - 1, -(2**63), 12345, 7, 7, 1, 2], np.int64)

    def inputs() -> Arrays:
        return {"ids": ids, **{str(list(shape)): with_special_values(normal(shape, dtype)) for shape in shapes}}

    def run(arrays: Arrays) -> Arrays:
        results = {}
        for shape in shapes:
            x, of_call = arrays[str(list(shape))], {"start": start, "sample_ids": arrays["ids"][: shape[0]]}
            y, saved = ops.dropout_forward(x, 0.4, _SEED, _OFFSET, **of_call)
            results[f"y {list(shape)}"] = y
            results[f"dx {list(shape)}"] = ops.dropout_backward(x, saved)
            mean, variance = ops.dropout_moments(x, 0.4, _SEED, _OFFSET, passes=5, **of_call)
            results[f"mean {list(shape)}"], results[f"variance {list(shape)}"] = mean, variance
        return results

    return Case("sample_dropout", dtype, f"start={start}", inputs, run)


def draw_cases() -> Iterator[Case]:
    """Seed and offset in device memory, as for CUDA graphs, at the last offset that there is."""
    for dtype in FLOAT_DTYPES:
        yield _draw(dtype)


def _draw(dtype: np.dtype) -> Case:
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "elements": (ops.dropout_forward, {}),
        "shard": (ops.dropout_forward, {"start": 3}),
        "channels": (ops.dropout_forward, {"mask_axes": 2}),
        "shared": (ops.dropout_forward, {"shared_axes": (1,)}),
        "samples": (ops.dropout_forward, {"sample_ids": True}),
        "samples, shard": (ops.dropout_forward, {"sample_ids": True, "start": 3}),
        "alpha": (ops.alpha_dropout_forward, {}),
    }

    def inputs() -> Arrays:
        numbers = np.array([_SEED, 2**64 - 1, sample_seed(_SEED)], np.uint64)
        return {"x": normal((6, 4, 8), dtype), "rng_state": numbers, "ids": np.array([3, -1, 2**62, 0, 7, 7])}

    def run(arrays: Arrays) -> Arrays:
        x, rng_state = arrays["x"], arrays["rng_state"].copy()
        forwards = {}
        for name, (forward, options) in calls.items():
            of_call = options | ({"sample_ids": arrays["ids"]} if "sample_ids" in options else {})
            forwards[name] = forward(x, 0.5, None, None, rng_state=rng_state, **of_call)
        y, relu = ops.activation_dropout_forward(x, "relu", 0.5, None, None, rng_state=rng_state)
        leaky = partial(ops.activation_dropout_forward, x, "leaky_relu", 0.5, None, None, rng_state=rng_state)
        (z, leaky_relu), (last_z, last) = leaky(), leaky(channels_last=True)
        summed, added = ops.dropout_add_forward(
            x, x, 0.5, None, None, bias=x[0, 0], rng_state=rng_state, sample_ids=arrays["ids"]
        )
        taken = rng_state.copy()
        backend_for(rng_state).advance_rng_state(rng_state, taken)
        results = {"relu y": y, "leaky_relu y": z, "advanced": rng_state, "taken": taken}
        results["relu dx"] = ops.activation_dropout_backward(x, relu)
        results["leaky_relu dx"] = ops.activation_dropout_backward(x, leaky_relu.with_rng_state(taken))
        results["leaky_relu y, last"] = last_z
        results["leaky_relu dx, last"] = ops.activation_dropout_backward(x, last.with_rng_state(taken))
        results["dropout_add y"] = summed
        results["dropout_add dx"], _, _ = ops.dropout_add_backward(x, added.with_rng_state(taken))
        for name, (y, saved) in forwards.items():
            results[f"{name} y"] = y
            results[f"{name} dx"] = ops.dropout_backward(x, saved.with_rng_state(taken))
        return results

    return Case("graph_dropout", dtype, "numbers in memory", inputs, run)


# ---- what is timed, and whose bytes are counted ----------------------------------------------------------------------

#: Probability, seed and offset: the same masks in the benchmark, in the model and where bytes are counted.
P, TIMED = 0.5, (1, 2)
_ROWS, _IMAGES = (16, 4096), (4, 64, 256)


def _floor(s: Sizes, direction: str, kept: float = 1.0) -> int:
    # What is dropped with its neighbours need not be read: `kept` is the rest's part.
    return s.elements(1) + round(kept * s.elements(1))


def _traffic(name: str, shape: Shape, **options: Any) -> Callable[[Operation, Any], Iterator[TrafficCase]]:
    return lambda operation, dtype: passes(operation, name, dtype, shape, **options)


def _elements(forward: Callable[..., Any], **options: Any) -> Callable[[Arrays, bool], Any]:
    return lambda a, last: forward(a["x"], P, *TIMED, start=a["start"], **options)


@cache
def _kept(decisions: int, offset: int) -> float:
    with use_backend("reference"):
        return float(ops.dropout_mask(decisions, P, TIMED[0], offset).mean())


def _together(axes: int, forward: Callable[..., Any], offset: int = TIMED[1]) -> dict[str, Any]:
    """How elements with the same indices on the first axes, which are dropped together, are run; what is read."""

    def run(a: Arrays, channels_last: bool) -> Any:
        # A decision for each of these indices: that is what the operation counts.
        start = a["start"] and a["start"] // math.prod(a["x"].shape[axes:])
        return forward(a["x"], P, TIMED[0], offset, start=start, mask_axes=axes)

    def kept(shape: Shape) -> float:
        return _kept(math.prod(shape[:axes]), offset)

    return {"forward": run, "kept": kept, "floor": lambda s, direction: _floor(s, direction, kept(s.shape))}


def dropout_jax(jax: Any, arrays: Arrays, channels_last: bool) -> Array:
    """Dropout in JAX."""
    x = arrays["x"]
    kept = jax.random.bernoulli(jax.random.PRNGKey(TIMED[0]), 1 - P, x.shape)
    return jax.numpy.where(kept, x / (1 - P), 0).astype(x.dtype)


def _dropout_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    def channels_last(x: Array) -> Any:
        return ops.dropout_forward(x, P, *TIMED, channels_last=True)

    def with_residual() -> Prepared:
        x = normal(_ROWS, dtype)
        return lambda: ops.dropout_forward(x, P, *TIMED, residual=x.copy()), 3 * x.nbytes

    yield from passes(operation, "dropout", dtype, _ROWS)
    yield from passes(operation, "dropout of a shard", dtype, _ROWS, start=2**33 + 3)
    yield from passes(operation, "dropout, channels last", dtype, (4, 16, 16, 64), forward=channels_last)
    yield TrafficCase("dropout add forward", dtype, _ROWS, "flat", with_residual)


DROPOUT = Operation(
    name="dropout",
    shapes=(*LARGE_ROWS, *LARGE_IMAGES, *SMALL_IMAGES, *SMALL_ROWS, *SINGLE_IMAGE),
    forward=_elements(ops.dropout_forward),
    backward=ops.dropout_backward,
    floor=_floor,
    torch_bytes=lambda s, direction: s.elements(2) + s.inputs,  # and a mask of one byte
    cases=(dropout_cases, channels_last_dropout_cases, residual_dropout_cases, draw_cases),
    traffic=_dropout_traffic,
    layers=(LayerExample(layers.Dropout, (0.4,)),),
    torch=lambda F, t: F.dropout(t["x"], P, training=True),  # noqa: N803 - its usual name
    expression=lambda xp, a, last: xp.where(xp.random.random(a["x"].shape) >= P, a["x"] / (1 - P), 0),
    jax=dropout_jax,
    independent="elements",
    is_random=True,
)

CHANNEL_DROPOUT = Operation(
    name="channel_dropout",
    shapes=IMAGES,
    **_together(2, ops.dropout_forward),
    backward=ops.dropout_backward,
    torch_bytes=lambda s, direction: s.elements(2),
    cases=(channel_dropout_cases,),
    traffic=_traffic("channel dropout", _IMAGES),
    layers=of_ranks(layers.Dropout1d, layers.Dropout2d, layers.Dropout3d, arguments=(0.4,)),
    torch=lambda F, t: F.dropout2d(t["x"], P, training=True),  # noqa: N803
    expression=lambda xp, a, last: xp.where(xp.random.random((*a["x"].shape[:2], 1, 1)) >= P, a["x"] / (1 - P), 0),
    is_random=True,
)

ALPHA_DROPOUT = Operation(
    name="alpha_dropout",
    shapes=(*LARGE_ROWS, *SMALL_ROWS),
    forward=_elements(ops.alpha_dropout_forward),
    backward=ops.dropout_backward,
    floor=_floor,
    # Draws noise (1), makes shift (6) and scale (2) of it, multiplies (3) and adds (3); the backward multiplies.
    torch_bytes=per_pass(lambda s: s.elements(15), lambda s: s.elements(3)),
    cases=(alpha_dropout_cases,),
    traffic=_traffic("alpha dropout", _ROWS),
    layers=(LayerExample(layers.AlphaDropout, (0.3,), axes=3),),
    torch=lambda F, t: F.alpha_dropout(t["x"], P, training=True),  # noqa: N803
    independent="elements",
    is_random=True,
)


@cache
def _numbers(xp: Any, shape: Shape, start: int) -> Array:
    """Of the rows of a shard that begins with this decision."""
    first = start // math.prod(shape[1:])
    return xp.arange(first, first + shape[0], dtype=np.int64)


def _by_sample(a: Arrays, channels_last: bool) -> Any:
    x = a["x"]
    return ops.dropout_forward(x, P, *TIMED, sample_ids=_numbers(array_module(x), x.shape, a["start"]))


SAMPLE_DROPOUT = Operation(
    name="sample_dropout",
    shapes=LARGE_ROWS,
    forward=_by_sample,
    backward=ops.dropout_backward,
    floor=_floor,
    torch_bytes=lambda s, direction: s.elements(2) + s.inputs,  # of a dropout that knows no samples
    cases=(sample_dropout_cases,),
    traffic=_traffic("dropout by sample", _ROWS),
    is_random=True,
)


def _shared(a: Arrays, channels_last: bool) -> Any:
    # All channels of a place in a sample, as all steps of time elsewhere.
    start = a["start"] and a["start"] // a["x"].shape[1]
    return ops.dropout_forward(a["x"], P, *TIMED, start=start, shared_axes=(1,))


SHARED_DROPOUT = Operation(
    name="shared_dropout",
    shapes=LARGE_IMAGES,
    forward=_shared,
    backward=ops.dropout_backward,
    floor=_floor,
    torch_bytes=lambda s, direction: s.elements(2),
    cases=(shared_dropout_cases,),
    traffic=_traffic("dropout of all steps", _IMAGES),
    torch=lambda F, t: t["x"] * F.dropout(t["x"].new_ones((len(t["x"]), 1, *t["x"].shape[2:])), P, training=True),  # noqa: N803
    expression=lambda xp, a, last: a["x"] * ((xp.random.random((len(a["x"]), 1, *a["x"].shape[2:])) >= P) / (1 - P)),
    is_random=True,
)

# Numbers that keep a half of the first 32, 64 and 256 samples; where bytes are counted, the numbers of the others.
_HALF, _COUNTED = _together(1, ops.dropout_forward, 288), _together(1, ops.dropout_forward)

DROP_PATH = Operation(
    name="drop_path",
    shapes=(*LARGE_IMAGES, *SMALL_IMAGES[:1]),
    **_HALF,
    backward=ops.dropout_backward,
    torch_bytes=lambda s, direction: s.elements(2),
    traffic=_traffic(
        "drop path",
        (64, 1024),
        forward=lambda x: _COUNTED["forward"]({"x": x, "start": 0}, False),
        floor=lambda s, direction, saved: _COUNTED["floor"](s, direction),
    ),
    layers=(LayerExample(layers.DropPath, (0.4,), axes=3),),
    torch=lambda F, t: t["x"] * F.dropout(t["x"].new_ones((len(t["x"]), 1, 1, 1)), P, training=True),  # noqa: N803
    expression=lambda xp, a, last: a["x"] * ((xp.random.random((len(a["x"]), 1, 1, 1)) >= P) / (1 - P)),
    is_random=True,
)

FEATURE_ALPHA_DROPOUT = Operation(
    name="feature_alpha_dropout",
    shapes=LARGE_IMAGES[:1],
    **_together(2, ops.alpha_dropout_forward),
    backward=ops.dropout_backward,
    # The noise is of channels: what is left is to multiply and to add.
    torch_bytes=per_pass(lambda s: s.elements(4), lambda s: s.elements(2)),
    traffic=_traffic("feature alpha dropout", _IMAGES),
    layers=(LayerExample(layers.FeatureAlphaDropout, (0.4,), axes=3),),
    torch=lambda F, t: F.feature_alpha_dropout(t["x"], P, training=True),  # noqa: N803
    is_random=True,
)

_PASSES = 8


def _moments_floor(s: Sizes, direction: str) -> int:
    # Mean and variance are of the type that is computed in.
    return s.elements(1) + 2 * s.accumulated * s.inputs


def _moments_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    def prepare() -> Prepared:
        x = normal(_ROWS, dtype)
        floor = _moments_floor(Sizes(x.size, x.size, x.itemsize), FORWARD)
        return lambda: ops.dropout_moments(x, P, *TIMED, passes=3), floor

    yield TrafficCase("dropout moments", dtype, _ROWS, "flat", prepare)


DROPOUT_MOMENTS = Operation(
    name="dropout_moments",
    shapes=LARGE_ROWS,
    forward=lambda a, last: (_elements(ops.dropout_moments, passes=_PASSES)(a, last)[0], None),
    backward=None,
    floor=_moments_floor,
    # The passes, their copies in float32, and Welford's five operations on three arrays each.
    torch_bytes=lambda s, direction: _PASSES * (s.elements(3) + s.inputs + 16 * s.accumulated * s.inputs),
    traffic=_moments_traffic,
    independent="elements",
    is_random=True,
    is_training=False,
)
