"""Launching ``dropout.cu``."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np

from gpu_layers.core.array import Array, DTypeLike
from gpu_layers.core.mask import MOST_DIGITS, DropoutMask
from gpu_layers.core.philox import sample_seed
from gpu_layers.core.reference_gpu import WARP_THREADS
from gpu_layers.kernels.arrays import ACCUMULATE_TYPES, ELEMENT_TYPES, element_type, empty, ready, vector_width
from gpu_layers.kernels.elementwise import THREADS, blocks_for, filled, tile_blocks, vector_blocks
from gpu_layers.runtime.kernel import C_TYPES, Arguments, KernelTemplate, accumulate_name, combinations
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.limits import limits
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["advance_rng_state", "dropout_backward", "dropout_forward", "dropout_moments", "sample_dropout"]

DIVISOR = np.dtype([("divisor", np.uint64), ("multiplier", np.uint64), ("shift", np.uint64)])
_RULES = {
    f"DropoutRule<{name}>": np.dtype(
        [
            ("last_dropped", np.uint32),
            ("drops_any", np.uint32),
            ("only_scales", np.uint32),
            *((number, C_TYPES[name]) for number in ("scale", "shift", "dropped")),
        ],
        align=True,
    )
    for name in ACCUMULATE_TYPES
}
_ROWS = np.dtype(
    [
        ("row", DIVISOR),
        ("sizes", DIVISOR, (MOST_DIGITS,)),
        ("weights", np.uint64, (MOST_DIGITS,)),
        ("rest", np.uint64),
        ("digits", np.int32),
        ("is_shared", np.int32),
    ]
)
_CHANNELS_LAST = np.dtype(
    [*((size, np.int64) for size in ("parts", "positions", "channels")), ("vectors", DIVISOR), ("groups", DIVISOR)]
)
STRUCTS = {"Divisor64": DIVISOR, "DecisionRows": _ROWS, "ChannelsLast": _CHANNELS_LAST, **_RULES}
# Of dropout_apply_grouped: the shortest run that it takes, vectors of a thread in a turn, elements of a warp at most.
_SHORT_RUN, _RUN_UNROLL, _RUN_SPAN = 16, 2, 1024
# Rows of a thread of dropout_apply_repeated.
_REPEATS = 8
# Of dropout_moments: elements of a span, where they are one row.
_SPAN = 4 * 4 * WARP_THREADS
_TYPES = combinations(T=ELEMENT_TYPES)
_APPLY = KernelTemplate("dropout.cu", "dropout_apply", _TYPES, STRUCTS)
_APPLY_SHIFTED = KernelTemplate("dropout.cu", "dropout_apply_shifted", _TYPES, STRUCTS)
_APPLY_RUNS = KernelTemplate("dropout.cu", "dropout_apply_grouped", _TYPES, STRUCTS)
_APPLY_REPEATED = KernelTemplate("dropout.cu", "dropout_apply_repeated", _TYPES, STRUCTS)
_APPLY_SHARED = KernelTemplate("dropout.cu", "dropout_apply_shared", _TYPES, STRUCTS)
_APPLY_ROWS = KernelTemplate("dropout.cu", "dropout_apply_samples", _TYPES, STRUCTS)
_APPLY_BLOCKS = KernelTemplate("dropout.cu", "dropout_apply_blocks", _TYPES, STRUCTS)
#: Of kernels over arrays whose channels lie side by side: whether or not they make vectors.
LAST_TYPES = [
    {"T": element, "Width": str(width)} for element in ELEMENT_TYPES for width in (vector_width(C_TYPES[element]), 1)
]
_APPLY_LAST = KernelTemplate("dropout.cu", "dropout_apply_last", LAST_TYPES, STRUCTS)
_MOMENTS = KernelTemplate(
    "dropout.cu", "dropout_moments", combinations(T=ELEMENT_TYPES, BySample=("false", "true")), STRUCTS
)
_ADVANCE = KernelTemplate("dropout.cu", "advance_rng_state", combinations(T=["unsigned long long"]))


def divisor(value: int) -> np.ndarray:
    """``Divisor64`` of ``division64.cuh``."""
    shift = (value - 1).bit_length()
    return np.array((value, 2**64 * (2**shift - value) // value + 1, shift), DIVISOR)


def decision_rows(run: int, digits: tuple[tuple[int, int], ...], rows: int = 0, size: int = 0) -> np.ndarray:
    """``DecisionRows`` of ``dropout_rule.cuh``.

    Parameters
    ----------
    run, digits
        Of the mask.
    rows : int
        Of an array of ``size`` elements, where each has consecutive decisions from the first on; 0 where rows have
        no decisions of their own.
    """
    packed = np.zeros((), _ROWS)
    if run > 1:
        # A run is a row; where runs are counted, their number is the only digit.
        packed["row"], packed["is_shared"] = divisor(run), 1
        digits = digits or ((1, 1),)
    elif digits:
        packed["row"], digits = divisor(digits[0][0]), digits[1:]
    elif rows:
        packed["row"] = divisor(size // rows)
    for index, (length, weight) in enumerate(digits[:-1]):
        packed["sizes"][index], packed["weights"][index] = divisor(length), weight
    packed["rest"], packed["digits"] = digits[-1][1] if digits else 0, max(len(digits) - 1, 0)
    return packed


def rule(drop_below: int, scale: float, shift: float, dropped: float, element: str) -> np.ndarray:
    """``DropoutRule`` of ``dropout_rule.cuh``."""
    only_scales = _FACTORS.pack(0.0, shift, dropped) == _FACTORS.pack(0.0, -0.0, 0.0)
    numbers = (max(drop_below - 1, 0), drop_below > 0, only_scales, scale, shift, dropped)
    with np.errstate(over="ignore"):
        return np.array(numbers, _RULES[f"DropoutRule<{accumulate_name(element)}>"])


def call_numbers(mask: DropoutMask) -> tuple[int, int, int]:
    """Seed (of sample 0, if samples have their own masks), offset and start: the numbers that change in each call."""
    seed = mask.seed if mask.sample_ids is None else sample_seed(mask.seed)
    return seed, mask.offset, mask.start


def dropout_forward(
    x: Array,
    mask: DropoutMask,
    scale: float,
    shift: float = -0.0,
    dropped: float = 0.0,
    out: Array | None = None,
    residual: Array | None = None,
    channels_last: bool = False,
) -> Array:
    """``gpu_layers.reference.dropout_forward``, as a kernel."""
    # As bytes: a key that tells -0 from +0.
    factors = _FACTORS.pack(scale, shift, dropped)
    arguments = (mask.drop_below, mask.run, mask.digits, mask.start % 8, factors, channels_last)
    return _apply((x, mask.sample_ids, mask.rng_state, out, residual), arguments, call_numbers(mask))


def sample_dropout(x: Array, mask: DropoutMask, scale: float) -> tuple[Array, Array]:
    """``gpu_layers.reference.sample_dropout``, as a kernel."""
    arguments = (mask.drop_below, mask.run, mask.digits, mask.start % 8, _FACTORS.pack(scale, -0.0, 0.0), False, True)
    return _apply((x, mask.sample_ids, mask.rng_state, None, None), arguments, call_numbers(mask))


_FACTORS = struct.Struct("3d")


@Launcher
def _apply(
    operands: Sequence[Array],
    numbers: Numbers,
    drop_below: int,
    run: int,
    digits: tuple[tuple[int, int], ...],
    phase: int,
    factors: bytes,
    channels_last: bool,
    keeps: bool = False,
) -> Array:
    """phase: of the first decision within two Philox blocks. keeps: whether it returns a copy of the ids too."""
    x, ids, rng_state, out, residual = operands
    seed, offset, start = numbers
    x = ready(x)
    element = element_type(x)
    scale, shift, dropped = _FACTORS.unpack(factors)
    of_call = (rule(drop_below, scale, shift, dropped, element), seed, offset, rng_state, start)
    kept = empty(ids.shape, ids.dtype, x) if keeps else None

    def fill(y: Array) -> None:
        blocks, arguments = vector_blocks(x.size, x.dtype), (x, y, x.size, *of_call)
        if residual is not None or (channels_last and run < math.prod(x.shape[1:])):
            _launch_last(element, arguments, None if residual is None else ready(residual), run, channels_last)
        elif ids is not None:
            _launch_samples(element, arguments, ready(ids), kept, phase)
        elif run == 1 and _are_repeated(digits, x):
            _launch_repeated(element, arguments, digits)
        elif digits or 1 < run < _SHORT_RUN:
            launch(_APPLY_SHARED(T=element), blocks, THREADS, (*arguments, decision_rows(run, digits)))
        elif run > 1:
            turns, blocks = _grouped_turns(x)
            launch(_APPLY_RUNS(T=element), blocks, THREADS, (*arguments, divisor(run), turns))
        else:
            kernel = _APPLY if _is_aligned(phase, x) else _APPLY_SHIFTED
            launch(kernel(T=element), blocks, THREADS, arguments)

    y = filled(out, x, fill)
    return (y, kept) if keeps else y


def _grouped_turns(x: Array) -> tuple[int, int]:
    """Turns of a warp of ``dropout_apply_grouped``, more where enough blocks remain; and blocks."""
    together, turns = _RUN_UNROLL * vector_width(x.dtype), 1
    least = THREADS * together * limits().full_grid
    while 2 * turns * together * WARP_THREADS <= _RUN_SPAN and x.size >= 2 * turns * least:
        turns *= 2
    return turns, tile_blocks(x.size, THREADS * turns * together)


def _launch_last(element: str, arguments: Arguments, residual: Array, run: int, channels_last: bool) -> None:
    x, y, _, *of_call = arguments
    # Otherwise one sample of one position: its channels are the elements.
    shape = x.shape if channels_last else (1, x.size)
    width, array, blocks = last_parts(shape, x.dtype)
    by_channel = int(run > 1 or not channels_last)
    kernel = _APPLY_LAST(T=element, Width=str(width))
    launch(kernel, blocks, THREADS, (x, y, array, *of_call, residual, by_channel))


def last_parts(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[int, np.ndarray, int]:
    """For an array of the shape ``(N, *spatial, C)``: channels of a thread, ``ChannelsLast`` and blocks."""
    samples, *spatial, channels = shape
    positions, width = math.prod(spatial), vector_width(dtype)
    if channels % width:
        width = 1
    vectors, groups = channels // width, -(-positions // 4)
    parts = samples * groups * vectors
    array = np.array((parts, positions, channels, divisor(vectors), divisor(groups)), _CHANNELS_LAST)
    return width, array, blocks_for(parts, THREADS)


def _are_repeated(digits: tuple[tuple[int, int], ...], x: Array) -> bool:
    """Whether rows of whole vectors have the decisions of the rows after them."""
    return len(digits) > 1 and digits[1][1] == 0 and digits[0][0] % vector_width(x.dtype) == 0


def _launch_repeated(element: str, arguments: Arguments, digits: tuple[tuple[int, int], ...]) -> None:
    x, y, size, *of_call = arguments
    (row, _), (repeats, _), *_ = digits
    vectors, groups = row // vector_width(x.dtype), -(-repeats // _REPEATS)
    parts = size // (row * repeats) * groups * vectors
    arguments = (x, y, parts, *of_call, decision_rows(1, digits), repeats, divisor(vectors), divisor(groups))
    launch(_APPLY_REPEATED(T=element), blocks_for(parts, THREADS), THREADS, arguments)


def _is_aligned(phase: int, x: Array) -> bool:
    """Whether vectors begin with a Philox block, or with the first of the two that they take."""
    return phase % max(4, vector_width(x.dtype)) == 0


def _philox_blocks(phase: int, count: int) -> int:
    return -(-(phase + count) // 4)


def _launch_samples(element: str, arguments: Arguments, ids: Array, kept: Array | None, phase: int) -> None:
    x, _, n, *_ = arguments
    features, width = n // ids.size, vector_width(x.dtype)
    arguments = (*arguments, ids, kept, 0 if kept is None else ids.size)
    if _is_aligned(phase, x) and features % width == 0:
        launch(_APPLY_ROWS(T=element), vector_blocks(n, x.dtype), THREADS, (*arguments, divisor(features)))
    else:
        row = _philox_blocks(phase % 4, features)
        blocks = blocks_for(row * ids.size, THREADS)
        launch(_APPLY_BLOCKS(T=element), blocks, THREADS, (*arguments, features, divisor(row)))


def dropout_moments(x: Array, mask: DropoutMask, scale: float, passes: int) -> tuple[Array, Array]:
    """``gpu_layers.reference.dropout_moments``, as a kernel."""
    features, span = x.size, _SPAN
    if mask.sample_ids is not None:
        features, span = x.size // max(1, mask.sample_ids.size), 4
    arguments = (mask.drop_below, -(-(mask.start % span + features) // span), scale, passes)
    return _moments((x, mask.sample_ids), arguments, call_numbers(mask))


@Launcher
def _moments(
    operands: Operands, numbers: Numbers, drop_below: int, spans: int, scale: float, passes: int
) -> tuple[Array, Array]:
    """spans: of a row's elements."""
    x, ids = operands
    seed, offset, start = numbers
    x = ready(x)
    element = element_type(x)
    mean, variance = (empty(x.shape, C_TYPES[accumulate_name(element)], x) for _ in range(2))
    if x.size:
        rows, spans_at_once = 1, THREADS // WARP_THREADS
        if ids is not None:
            ids = ready(ids)
            rows, spans_at_once = ids.size, THREADS
        of_call = (rule(drop_below, scale, 0.0, 0.0, element), seed, offset, start)
        arguments = (x, mean, variance, x.size, *of_call, passes, ids, x.size // rows, divisor(spans))
        kernel = _MOMENTS(T=element, BySample=str(ids is not None).lower())
        launch(kernel, tile_blocks(spans * rows, spans_at_once), THREADS, arguments)
    return mean, variance


def advance_rng_state(rng_state: Array, taken: Array) -> None:
    """``gpu_layers.reference.advance_rng_state``, as a kernel."""
    _advance((rng_state, taken))


@Launcher
def _advance(operands: Operands, numbers: Numbers) -> None:
    rng_state, taken = operands
    launch(_ADVANCE(T="unsigned long long"), 1, 1, (rng_state, rng_state, taken))


# As in the reference: the same map, of dy.
dropout_backward = dropout_forward
