"""Launching ``dropout_add.cu``."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.core.dropout_saved import DropoutAddSaved
from gpu_layers.core.mask import DropoutMask
from gpu_layers.core.reference_gpu import MULTIPROCESSORS
from gpu_layers.kernels.activation import empty_bits, octet_blocks
from gpu_layers.kernels.arrays import (
    ACCUMULATE_TYPES,
    ELEMENT_TYPES,
    delivered,
    destination,
    element_type,
    empty,
    ready,
    vector_width,
)
from gpu_layers.kernels.batch_norm_common import EXACT_GRADIENT, activation_number
from gpu_layers.kernels.dropout import STRUCTS, call_numbers, decision_rows, divisor, rule
from gpu_layers.kernels.elementwise import THREADS, blocks_for, filled
from gpu_layers.runtime.kernel import (
    C_TYPES,
    FLOAT_DTYPES,
    Arguments,
    KernelTemplate,
    accumulate_name,
    c_name,
    combinations,
)
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.program import Launcher, Numbers, Operands

__all__ = ["dropout_add_backward", "dropout_add_forward"]

_WARP = 32
_SOURCE = "dropout_add.cu"
# Whether a kernel is of no activation or ReLU, and decisions that are simply numbered, or of everything else.
_STRAIGHT = ("true", "false")
# Of the backward of either: rows of a thread at a time, and blocks, all that a GPU holds at once.
_ROWS = dict(zip(_STRAIGHT, (4, 2), strict=True))
_MOST_BLOCKS = dict(zip(_STRAIGHT, (3 * MULTIPROCESSORS, 2 * MULTIPROCESSORS), strict=True))
# Features of a block that adds up what they leave.
_MERGE_FEATURES = 32
_FORWARD = KernelTemplate(_SOURCE, "dropout_add_forward", combinations(T=ELEMENT_TYPES, Straight=_STRAIGHT), STRUCTS)
_BACKWARD = KernelTemplate(
    _SOURCE,
    "dropout_add_backward",
    [
        {"T": c_name(dtype), "Width": str(width), "Straight": straight}
        for dtype in FLOAT_DTYPES
        for width in (vector_width(dtype), 1)
        for straight in _STRAIGHT
    ],
    STRUCTS,
)
_MERGE = KernelTemplate(_SOURCE, "dropout_add_merge", combinations(A=ACCUMULATE_TYPES))


def dropout_add_forward(
    x: Array,
    bias: Array | None,
    residual: Array,
    activation: str,
    mask: DropoutMask,
    scale: float,
    dropout_first: bool,
    out: Array | None = None,
) -> tuple[Array, Array | None]:
    """``gpu_layers.reference.dropout_add_forward``, as a kernel."""
    operands = (x, bias, residual, mask.rng_state, mask.sample_ids, out)
    arguments = (activation, mask.drop_below, scale, dropout_first, mask.run, mask.digits)
    return _forward(operands, arguments, call_numbers(mask))


def dropout_add_backward(dy: Array, saved: DropoutAddSaved, out: Array | None = None) -> tuple[Array, Array | None]:
    """``gpu_layers.reference.dropout_add_backward``, as kernels."""
    mask, scale = saved.dropout.mask, saved.dropout.scale
    operands = (dy, saved.x, saved.bias, saved.gradient_bits, mask.rng_state, mask.sample_ids, out)
    of_mask = (mask.drop_below, scale, saved.is_first, mask.run, mask.digits)
    return _backward(operands, (saved.activation, *of_mask, saved.has_bias), call_numbers(mask))


def _call(
    x: Array,
    rng_state: Array,
    ids: Array | None,
    numbers: Numbers,
    activation: str,
    drop_below: int,
    scale: float,
    dropout_first: bool,
    run: int,
    digits: tuple[tuple[int, int], ...],
) -> Arguments:
    seed, offset, start = numbers
    of_rule = rule(drop_below, scale, 0.0, 0.0, element_type(x))
    rows = decision_rows(run, digits, 0 if ids is None else ids.size, x.size)
    return activation_number(activation), int(dropout_first), of_rule, seed, offset, rng_state, start, rows, ids


def _straight(activation: str, ids: Array | None, run: int, digits: tuple[tuple[int, int], ...]) -> str:
    is_straight = activation in EXACT_GRADIENT and ids is None and run == 1 and not digits
    return _STRAIGHT[0 if is_straight else 1]


@Launcher
def _forward(operands: Operands, numbers: Numbers, activation: str, *of_mask: Any) -> tuple[Array, Array]:
    x, bias, residual, rng_state, ids, out = operands
    x, residual = ready(x), ready(residual)
    bias, ids = (None if one is None else ready(one) for one in (bias, ids))
    bits = empty_bits(x) if activation == "relu" else None
    features = divisor(1 if bias is None else max(bias.size, 1))
    call = _call(x, rng_state, ids, numbers, activation, *of_mask)
    straight = _straight(activation, ids, *of_mask[-2:])
    kernel = _FORWARD(T=element_type(x), Straight=straight)
    blocks = octet_blocks(x)
    return filled(
        out, x, lambda y: launch(kernel, blocks, THREADS, (x, bias, residual, y, bits, x.size, features, *call))
    ), bits


@Launcher
def _backward(operands: Operands, numbers: Numbers, activation: str, *of_mask: Any) -> tuple[Array, Array]:
    dy, x, bias, bits, rng_state, ids, out = operands
    *of_call, sums_rows = of_mask
    dy = ready(dy)
    x, bias, bits, ids = (None if one is None else ready(one) for one in (x, bias, bits, ids))
    element = element_type(dy)
    wide = C_TYPES[accumulate_name(element)]
    features = dy.shape[-1] if dy.shape else 1
    dbias = dy.program.allocate((features,), wide, zeroed=dy.size == 0) if sums_rows else None
    if dy.size == 0:
        return delivered(destination(out, dy), out), dbias
    rows = math.prod(dy.shape[:-1])
    straight = _STRAIGHT[0] if bits is not None else _straight(activation, ids, *of_call[-2:])
    width, threads, tiles, blocks, chunks = _shares(rows, features, dy.dtype.itemsize, straight)
    sums = empty((blocks, features), wide, dy) if sums_rows and blocks > 1 else dbias
    if bits is not None:
        # What they say leaves nothing of the activation, and nothing of the mask.
        activation, ids, of_call[-2:] = "identity", None, (1, ())
    call = _call(dy, rng_state, ids, numbers, activation, *of_call)
    kernel = _BACKWARD(T=element, Width=str(width), Straight=straight)
    arguments = (*call, rows, features, tiles, blocks, chunks)
    block = (threads, THREADS // threads)
    dx = filled(out, dy, lambda dx: launch(kernel, tiles * blocks, block, (dy, x, bias, bits, dx, sums, *arguments)))
    if sums is not dbias:
        merge = _MERGE(A=c_name(wide))
        launch(merge, blocks_for(features, _MERGE_FEATURES), THREADS, (sums, dbias, features, blocks))
    return dx, dbias


@lru_cache(maxsize=1024)
def _shares(rows: int, features: int, itemsize: int, straight: str) -> tuple[int, int, int, int, int]:
    """How blocks share rows, from the sizes alone: they fix the order of the sums.

    Returns
    -------
    width, threads : int
        Features of a thread, and threads side by side over them.
    tiles, blocks, chunks : int
        Blocks side by side, those of a tile, and chunks of the rows that they take in turn.
    """
    width = 16 // itemsize
    width = width if features % width == 0 else 1
    vectors = features // width
    # 128 bytes of a row; single features by the warp.
    threads = min(1 << (vectors - 1).bit_length(), 8 if width > 1 else _WARP)
    tiles = -(-vectors // threads)
    chunks = -(-rows // (THREADS // threads * _ROWS[straight]))
    blocks = min(max(_MOST_BLOCKS[straight] // tiles, 1), chunks)
    # As many as are busy to the end.
    return width, threads, tiles, -(-chunks // -(-chunks // blocks)), chunks
