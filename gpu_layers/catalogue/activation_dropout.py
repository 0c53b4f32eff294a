"""Activation and dropout in one pass, alone and with a bias and a residual."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial, wraps
from typing import Any

import ml_dtypes
import numpy as np

from gpu_layers import layers, ops
from gpu_layers.catalogue.case import Arrays, Case, epsilon, smallest
from gpu_layers.catalogue.dropout import EXTREME, EXTREME_WORDS, TIMED, P, around, dropout_jax
from gpu_layers.catalogue.inputs import normal, with_special_values
from gpu_layers.catalogue.operation import (
    FORWARD,
    LARGE_IMAGES,
    LARGE_ROWS,
    SMALL_IMAGES,
    SMALL_ROWS,
    LayerExample,
    Operation,
    Sizes,
    per_pass,
)
from gpu_layers.catalogue.traffic import TrafficCase, passes
from gpu_layers.core.activations import NAMES
from gpu_layers.core.array import Array
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.core.philox import random_words
from gpu_layers.ops.activation_dropout import ORDERS
from gpu_layers.reference.activation import ACTIVATIONS
from gpu_layers.reference.ieee import ieee
from gpu_layers.runtime.kernel import FLOAT_DTYPES

#: The page of the documents that has these operations.
PAGE = "dropout"

_SEED, _OFFSET = 0x0123456789ABCDEF, 0xFEDCBA9876543210
# Size, p, start and whether channels are last. Less than the eight elements of a thread, no whole number of them, more
# than a block's; a shard that starts within a Philox block; nothing dropped, everything dropped, nothing there.
_CALLS: tuple[tuple[tuple[int, ...], float, int, bool], ...] = (
    ((5,), 0.5, 0, False),
    ((7, 11), 0.3, 2**33 + 3, False),
    ((3, 2051), 0.1, 4, False),
    ((9, 5), 0.4, 2**34 - 6, False),
    ((5,), 0.0, 0, False),
    ((40,), 0.0, 1, False),
    ((40,), 1.0, 0, False),
    ((0, 3), 0.5, 0, False),
    # Channels that make vectors and that make none, positions that fill no Philox block, more than a block's elements.
    ((2, 3, 5, 16), 0.4, 0, True),
    ((3, 7, 5), 0.3, 2**33 + 3, True),
    ((3, 130, 8), 0.1, 4, True),
    ((5, 24), 0.5, 2**34 - 6, True),
    ((2, 3, 8), 0.0, 0, True),
    ((2, 3, 7), 1.0, 0, True),
    ((0, 4, 8), 0.5, 0, True),
)


def activation_dropout_cases() -> Iterator[Case]:
    """All activations, in both orders; identity is dropout itself."""
    for dtype in FLOAT_DTYPES:
        for activation in NAMES:
            if activation != "identity":
                yield _activation_dropout(dtype, activation)
        yield _at_words(dtype)


def _runs(x: Array, shape: tuple[int, ...]) -> Array:
    return x.reshape(-1)[: int(np.prod(shape))].reshape(shape)


def _activation_dropout(dtype: np.dtype, activation: str) -> Case:
    def inputs() -> Arrays:
        # Up to 12 and more: where the functions underflow, saturate or cancel.
        x = with_special_values((normal((6153,), np.float32) * 4).astype(dtype))
        # What less than eight elements have by themselves.
        x[:5] = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0]).astype(dtype)
        return {"x": x, "dy": normal((6153,), dtype, "dy")}

    def run(arrays: Arrays) -> Arrays:
        results = {}
        for (shape, p, start, last), order in itertools.product(_CALLS, ORDERS):
            x, dy = _runs(arrays["x"], shape), _runs(arrays["dy"], shape)
            of_call: dict[str, Any] = {"order": order, "start": start, "channels_last": last}
            y, saved = ops.activation_dropout_forward(x, activation, p, _SEED, _OFFSET, **of_call)
            name = f"{list(shape)} p={p} {order}"
            results[f"y {name}"] = y
            results[f"dx {name}"] = ops.activation_dropout_backward(dy, saved)
            if saved.gradient_bits is not None:
                results[f"bits {name}"] = saved.gradient_bits
        return results

    @ieee
    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        if ACTIVATIONS[activation].is_exact:
            return {}
        allowed = {}
        for (shape, p, *_), order in itertools.product(_CALLS, ORDERS):
            scale = 1 / (1 - p) if p < 1 else 0.0
            x, dy = (_runs(inputs[name], shape).astype(np.float64) for name in ("x", "dy"))
            x = x * scale if order == "before" else x
            name = f"{list(shape)} p={p} {order}"
            y, dx = expected[f"y {name}"].astype(np.float64), expected[f"dx {name}"].astype(np.float64)
            allowed[f"y {name}"] = _error_of_forward(activation, x, y, dtype)
            allowed[f"dx {name}"] = _error_of_backward(activation, x, dy * scale, dx, dtype)
        return allowed

    return Case("activation_dropout", dtype, activation, inputs, run, bounds)


def _at_words(dtype: np.dtype) -> Case:
    """Probabilities at the very words that decide: one keeps the element, the next one drops it."""

    def inputs() -> Arrays:
        # Positive, so that what is kept is seen; more than the eight elements of a thread, and no whole number of them.
        return {"x": abs(normal((37,), dtype)) + dtype.type(1), "dy": normal((37,), dtype, "dy")}

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        calls: list[tuple[tuple[int, int], int, int]] = []
        for start, place in itertools.product((0, 3), (5, 36)):
            calls.append(((_SEED, _OFFSET), start, int(random_words(_SEED, _OFFSET, start, 37)[place])))
            calls += [(EXTREME, element - place, word) for element, word in EXTREME_WORDS.items()]
        for numbers, start, word in calls:
            for p, activation, order in itertools.product(around(word), ("relu", "leaky_relu"), ORDERS):
                options: dict[str, Any] = {"order": order, "start": start}
                y, saved = ops.activation_dropout_forward(arrays["x"], activation, p, *numbers, **options)
                name = f"{word} from {start}, p={p}, {activation} {order}"
                results[f"y {name}"] = y
                results[f"dx {name}"] = ops.activation_dropout_backward(arrays["dy"], saved)
        return results

    return Case("activation_dropout", dtype, "p at a word", inputs, run)


# Shape, and options of the call: features that make vectors and that make none; rows whose gradient of the bias several
# blocks add; decisions shared along axes; rows with masks of their own; a shard; dropout before the activation; nothing
# dropped, everything dropped, nothing there.
_BRANCHES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((5, 16), {"bias": True}),
    ((7, 11), {"bias": True, "order": "before", "start": 2**33 + 3}),
    ((70, 40), {"bias": True, "shared_axes": (0,)}),
    ((350, 8), {"bias": True}),
    ((3, 4, 24), {"shared_axes": (1,), "order": "before"}),
    ((6, 5, 7), {"bias": True, "shared_axes": (0, 2)}),
    ((4, 37), {"bias": True, "sample_ids": True, "start": 1}),
    ((2, 3, 8), {"sample_ids": True}),
    ((1, 40), {"sample_ids": True, "p": 0.5}),
    ((9, 8), {"p": 0.0, "bias": True}),
    ((9, 9), {"p": 1.0, "bias": True}),
    ((3, 701), {}),
    ((0, 8), {"bias": True}),
    ((), {}),
)


def dropout_add_cases() -> Iterator[Case]:
    """A residual and what dropout leaves of a branch; of the activations one of each kind."""
    for dtype in FLOAT_DTYPES:
        for activation in (None, "relu", "leaky_relu", "gelu"):
            for bias_dtype in dict.fromkeys((dtype, accumulation_dtype(dtype))):
                yield _dropout_add(dtype, activation, bias_dtype)


def _dropout_add(dtype: np.dtype, activation: str | None, bias_dtype: np.dtype) -> Case:
    def inputs() -> Arrays:
        x = with_special_values((normal((2804,), np.float32) * 4).astype(dtype))
        others = {name: normal((2804,), dtype, name) for name in ("residual", "dy")}
        return {
            "x": x,
            **others,
            "bias": normal((40,), bias_dtype, "bias"),
            "ids": np.array([-1, 2**62, 7, 7], np.int64),
        }

    def run(arrays: Arrays) -> Arrays:
        results: Arrays = {}
        for shape, options in _BRANCHES:
            x, residual, dy = (_runs(arrays[name], shape) for name in ("x", "residual", "dy"))
            of_call = {"p": 0.4, "activation": activation, **options}
            if options.get("bias"):
                of_call["bias"] = arrays["bias"][: shape[-1]]
            if "sample_ids" in options:
                of_call["sample_ids"] = arrays["ids"][: shape[0]]
            y, saved = ops.dropout_add_forward(x, residual, seed=_SEED, offset=_OFFSET, **of_call)
            target = residual.copy()
            ops.dropout_add_forward(x, target, seed=_SEED, offset=_OFFSET, out=target, **of_call)
            dx, _, dbias = ops.dropout_add_backward(dy, saved)
            name = f"{list(shape)} {options}"
            results |= {f"y {name}": y, f"in place {name}": target, f"dx {name}": dx}
            if dbias is not None:
                results[f"dbias {name}"] = dbias
            if saved.gradient_bits is not None:
                results[f"bits {name}"] = saved.gradient_bits
        return results

    @ieee
    def bounds(inputs: Arrays, expected: Arrays) -> Arrays:
        allowed = {}
        for shape, options in _BRANCHES:
            name = f"{list(shape)} {options}"
            x, residual, dy = (_runs(inputs[one], shape).astype(np.float64) for one in ("x", "residual", "dy"))
            dx, p = expected[f"dx {name}"].astype(np.float64), options.get("p", 0.4)
            wide, scale = accumulation_dtype(dtype), 1 / (1 - p) if p < 1 else 0.0
            error = np.zeros(shape)
            if activation == "gelu":
                x = x + inputs["bias"][: shape[-1]].astype(np.float64) if options.get("bias") else x
                x = x * scale if options.get("order") == "before" else x
                y = expected[f"y {name}"].astype(np.float64)
                # The branch is no larger than y and the residual together, whose sum is rounded too.
                size = np.abs(y) + np.abs(residual)
                units = (_magnified(x, dtype) + 10) * size
                own = _of_polynomials(size, dtype)
                allowed[f"y {name}"] = allowed[f"in place {name}"] = _rounded(units, y, dtype) + own
                allowed[f"dx {name}"] = _error_of_backward(activation, x, dy * scale, dx, dtype)
                # That of the derivative is as large a part of what is added up.
                own = _of_polynomials(dx, dtype) + smallest(dtype) * np.abs(dy)
                error = _error_of_backward(activation, x, dy * scale, dx, wide) + own
                # Of an infinite x the derivative is 0 or 1, without an error.
                error = np.where(np.isinf(x), 0.0, error)
            if options.get("bias"):
                dbias = expected[f"dbias {name}"].astype(np.float64)
                # Whatever the order, each value passes through fewer additions than there are rows.
                axes = tuple(range(len(shape) - 1))
                depth = int(np.prod(shape[:-1])) + 1
                sums = (error + depth * epsilon(wide) * np.abs(dx) * (1 + epsilon(dtype))).sum(axis=axes)
                stored = np.abs(dbias) * epsilon(bias_dtype) + smallest(bias_dtype) if bias_dtype != wide else 0
                allowed[f"dbias {name}"] = sums + stored + float(ml_dtypes.finfo(wide).smallest_normal)
        return allowed

    label = f"{activation}, bias of {np.dtype(bias_dtype)}"
    return Case("dropout_add", dtype, label, inputs, run, bounds)


def _error_of_forward(activation: str, x: np.ndarray, y: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Error of y, from the errors that ``activation.cuh`` names, in units u in the last place of what computes.

    sigmoid: exp 2 u, which the sum passes on, 1/2 for the sum, 2 for the quotient, 2 for the numerator; a product
    with x (silu) and one with the scale 1/2 each: 7 u. tanh: 2 u. gelu: erfc 4 u (5 in double), what is left of its
    argument's error 2 u, and two products. In float32 alone is little left: else that error, 1 u, is magnified by up to
    x**2 + 2, the quotient of z erfc'(z) and erfc(z) at z = x / sqrt(2).

    Half types: a tenth of a unit in their last place (half_activation.cuh), which is no more than the next number once
    both results are rounded.
    """
    return _rounded((_magnified(x, dtype) + 9 if activation == "gelu" else 8) * np.abs(y), y, dtype)


def _magnified(x: np.ndarray, dtype: np.dtype) -> np.ndarray | int:
    return 0 if dtype == np.float32 else np.minimum(x * x, 1e3)


def _error_of_backward(
    activation: str, x: np.ndarray, gradient: np.ndarray, dx: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """Error of dx, likewise.

    sigmoid, tanh: exp 2 u, the sum 1.5, its square 3.5, the quotient 2, two products: 9 u. silu: two such terms.
    gelu: the distribution as above, and x times the density, whose exponent x**2 / 2 is off by 1/2 u of itself but
    in float32.
    """
    size = np.abs(dx)
    if activation == "silu":
        slope = np.abs(x) * _slope("sigmoid", x) + ACTIVATIONS["sigmoid"].forward(x)
        size = np.abs(gradient) * slope
    if activation == "gelu":
        density = np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)
        size = np.abs(gradient) * (_distribution(x) + np.abs(x) * density)
    return _rounded((_magnified(x, dtype) + 10 if activation == "gelu" else 10) * size, dx, dtype)


def _of_polynomials(size: np.ndarray, dtype: np.dtype) -> np.ndarray | float:
    """What half_activation.cuh is off by before it is rounded."""
    return 0.1 * epsilon(dtype) * np.abs(size) if dtype != accumulation_dtype(dtype) else 0.0


def _slope(activation: str, x: np.ndarray) -> np.ndarray:
    return ACTIVATIONS[activation].derivative(x)


def _distribution(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, 0.5, ACTIVATIONS["gelu"].forward(x) / np.where(x == 0, 1, x))


def _rounded(units: np.ndarray, result: np.ndarray, dtype: np.dtype) -> np.ndarray:
    accumulate = accumulation_dtype(dtype)
    # The reference's own functions are no better than the kernels' where both compute in double; what underflows may
    # become 0.
    own = 2 if dtype == np.float64 else 1
    error = units * own * epsilon(accumulate) + float(ml_dtypes.finfo(accumulate).smallest_normal)
    if dtype == accumulate:
        return error
    # The distance to the next number of the half type.
    exponents = np.frexp(np.where(np.isfinite(result), result, 0.0))[1]
    return error + np.maximum(np.ldexp(epsilon(dtype), exponents - 1), smallest(dtype))


# ---- what is timed, and whose bytes are counted ----------------------------------------------------------------------


def _floor(s: Sizes, direction: str) -> int:
    # The backward needs x.
    return s.elements(2 if direction == FORWARD else 3)


def _relu_floor(s: Sizes, direction: str) -> int:
    # Of ReLU one bit an element is enough.
    return s.elements(2) + s.inputs // 8


def _call(x: Array, activation: str, order: str = "after", **options: Any) -> Any:
    return ops.activation_dropout_forward(x, activation, P, *TIMED, order=order, **options)


def _traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    floors = {"relu": _relu_floor, "gelu": _floor}
    for activation, order in itertools.product(floors, ORDERS):
        yield from passes(
            operation,
            f"{activation} dropout" if order == "after" else f"dropout {activation}",
            dtype,
            (16, 4096),
            forward=lambda x, call=(activation, order): _call(x, *call),
            floor=lambda s, direction, saved, floor=floors[activation]: floor(s, direction),
        )
    forward = partial(_call, activation="gelu", channels_last=True)
    yield from passes(operation, "gelu dropout, channels last", dtype, (4, 16, 16, 64), forward=forward)


ACTIVATION_DROPOUT = Operation(
    name="activation_dropout",
    shapes=(*LARGE_ROWS, *LARGE_IMAGES, *SMALL_IMAGES, *SMALL_ROWS),
    forward=lambda a, last: _call(a["x"], "gelu", start=a["start"]),
    backward=ops.activation_dropout_backward,
    floor=_floor,
    # Two kernels each way, and the mask.
    torch_bytes=per_pass(lambda s: s.elements(4) + s.inputs, lambda s: s.elements(5) + s.inputs),
    cases=(activation_dropout_cases,),
    traffic=_traffic,
    layers=(LayerExample(layers.ActivationDropout, ("gelu", 0.4), {"order": "before"}),),
    torch=lambda F, t: F.dropout(F.gelu(t["x"]), P, training=True),  # noqa: N803
    jax=lambda jax, a, last: dropout_jax(jax, {"x": jax.nn.gelu(a["x"], approximate=False)}, last),
    independent="elements",
    is_random=True,
)

RELU_DROPOUT = ACTIVATION_DROPOUT.called(
    "relu_dropout",
    shapes=(*LARGE_ROWS, *SMALL_ROWS),
    forward=lambda a, last: _call(a["x"], "relu", start=a["start"]),
    floor=_relu_floor,
    torch=lambda F, t: F.dropout(F.relu(t["x"]), P, training=True),  # noqa: N803
    jax=lambda jax, a, last: dropout_jax(jax, {"x": jax.nn.relu(a["x"])}, last),
)

DROPOUT_ACTIVATION = ACTIVATION_DROPOUT.called(
    "dropout_activation",
    shapes=LARGE_ROWS,
    forward=lambda a, last: _call(a["x"], "gelu", "before", start=a["start"]),
    torch=lambda F, t: F.gelu(F.dropout(t["x"], P, training=True)),  # noqa: N803
    jax=lambda jax, a, last: jax.nn.gelu(dropout_jax(jax, a, last), approximate=False),
)


def _add_floor(s: Sizes, direction: str, activation: str | None = None) -> int:
    """With a bias: a number of the last axis, of the type that is computed in; the residual's gradient is that of y.

    The backward needs x, or, of ReLU, one bit an element, or nothing.
    """
    numbers = s.accumulated * s.shape[-1]
    bits = s.inputs // 8 if activation == "relu" else 0
    if direction == FORWARD:
        return s.elements(3) + bits + numbers
    keeps = activation not in (None, "relu")
    return s.elements(3 if keeps else 2) + bits + numbers * (2 if keeps else 1)


def _add(a: Arrays, activation: str | None) -> Any:
    options = {"bias": a["beta"], "activation": activation, "start": a["start"]}
    return ops.dropout_add_forward(a["x"], a["residual"], P, *TIMED, **options)


@wraps(ops.dropout_add_backward)
def _add_backward(dy: Array, saved: Any) -> Array:
    # That of the bias is no sum over a part of the rows, which is what is looked at.
    return ops.dropout_add_backward(dy, saved)[0]


def _add_traffic(operation: Operation, dtype: np.dtype) -> Iterator[TrafficCase]:
    shape = (512, 256)

    def run(x: Array, activation: str | None) -> Any:
        bias = normal(shape[-1:], accumulation_dtype(x.dtype))
        return _add({"x": x, "residual": normal(shape, x.dtype, "residual"), "beta": bias, "start": 0}, activation)

    for activation in (None, "relu", "gelu"):
        yield from passes(
            operation,
            f"bias {activation or ''} dropout add".replace("  ", " "),
            dtype,
            shape,
            forward=lambda x, activation=activation: run(x, activation),
            floor=lambda s, direction, saved, activation=activation: _add_floor(s, direction, activation),
            # The sums of the bias's gradient are merged by a second.
            launches=(1, 2),
        )


DROPOUT_ADD = Operation(
    name="dropout_add",
    shapes=(*LARGE_ROWS, *SMALL_ROWS),
    forward=lambda a, last: _add(a, None),
    backward=_add_backward,
    floor=_add_floor,
    # Three kernels forward, and the mask; backward dropout and the sums.
    torch_bytes=per_pass(lambda s: s.elements(7) + s.inputs, lambda s: s.elements(3) + s.inputs),
    cases=(dropout_add_cases,),
    traffic=_add_traffic,
    layers=(LayerExample(layers.DropoutAdd, (0.4,), inputs=2),),
    torch=lambda F, t: t["residual"] + F.dropout(t["x"] + t["beta"].to(t["x"].dtype), P, training=True),  # noqa: N803
    jax=lambda jax, a, last: a["residual"] + dropout_jax(jax, {"x": (a["x"] + a["beta"]).astype(a["x"].dtype)}, last),
    per_channel=("beta",),
    like_x=("residual",),
    is_random=True,
)

GELU_DROPOUT_ADD = DROPOUT_ADD.called(
    "gelu_dropout_add",
    shapes=LARGE_ROWS,
    forward=lambda a, last: _add(a, "gelu"),
    floor=lambda s, direction: _add_floor(s, direction, "gelu"),
    torch_bytes=per_pass(lambda s: s.elements(9) + s.inputs, lambda s: s.elements(6) + s.inputs),
    torch=lambda F, t: t["residual"] + F.dropout(F.gelu(t["x"] + t["beta"].to(t["x"].dtype)), P, training=True),  # noqa: N803
    jax=lambda jax, a, last: (
        a["residual"] + dropout_jax(jax, {"x": jax.nn.gelu(a["x"] + a["beta"], approximate=False)}, last)
    ),
)
