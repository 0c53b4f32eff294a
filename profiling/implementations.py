"""Who runs a case: this project, PyTorch, JAX, CuPy's array expressions, and a plain copy of as many bytes.

And whether their results are right, by parts of them that can be computed again in float64.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gpu_layers.catalogue.case import Arrays, epsilon
from gpu_layers.catalogue.operation import BACKWARD, FORWARD
from gpu_layers.core.dtypes import accumulation_dtype
from gpu_layers.kernels.batch_norm_plan import backward_plan, forward_plan
from gpu_layers.runtime.backend import use_backend
from gpu_layers.runtime.limits import force_limits
from profiling.cases import DTYPES, Case, InputMaker, call_of
from profiling.devices import Device

OURS, TORCH, COMPILED, JAX, CUPY, COPY = "ours", "torch", "torch.compile", "jax", "cupy", "copy"
TWO_READS = "two reads"


class NotThereError(Exception):
    """An implementation does not exist here, or not for this case; says why."""


class Implementation:
    """One way to run a case; made anew for each.

    Attributes
    ----------
    name : str
    wait : callable or None
        See ``profiling.timing.Subject``.
    """

    name: str
    wait: Callable[[Any], None] | None = None

    def __init__(self, case: Case, device: Device) -> None:
        self.case, self.device = case, device

    def prepare(self, arrays: Arrays) -> Callable[[], Any]:
        """What is timed: a call without arguments, on these inputs; what precedes a backward has been done."""
        raise NotImplementedError

    def results(self, result: Any) -> dict[str, Any]:
        """What a call returned, as arrays by name, in memory order."""
        return {"y": result} if self.case.direction == FORWARD else named(result)

    def to_numpy(self, array: Any) -> np.ndarray:
        """A (piece of a) result."""
        return np.asarray(array.get() if hasattr(array, "get") else array)


class Ours(Implementation):
    name = OURS

    def prepare(self, arrays: Arrays) -> Callable[[], Any]:
        """The public operation."""
        return call_of(self.case, arrays)

    def results(self, result: Any) -> dict[str, Any]:
        """Without what is saved for the backward."""
        return super().results(result[0] if self.case.direction == FORWARD else result)


class TwoReads(Ours):
    name = TWO_READS

    def __init__(self, case: Case, device: Device) -> None:
        super().__init__(case, device)
        if case.operation.name != "batch_norm":
            raise NotThereError("measured for plain batch norm")
        planned = forward_plan if case.direction == FORWARD else backward_plan
        if not planned(case.input_shape, DTYPES[case.dtype].itemsize, case.channels_last).slots:
            raise NotThereError("ours reads twice too")

    def prepare(self, arrays: Arrays) -> Callable[[], Any]:
        """The public operation, that keeps nothing of what it reads."""
        call = super().prepare(arrays)

        def twice() -> Any:
            with force_limits(two_reads=True):
                return call()

        return twice


class Torch(Implementation):
    name = TORCH

    def __init__(self, case: Case, device: Device) -> None:
        super().__init__(case, device)
        self.torch = _imported("torch")
        if device.kind == "measured" and not self.torch.cuda.is_available():
            raise NotThereError("PyTorch finds no GPU")
        if case.operation.torch is None:
            raise NotThereError("not an operation of PyTorch's")
        functional, run = self.torch.nn.functional, case.operation.torch
        self.function = self.optimized(lambda tensors: run(functional, tensors))

    def optimized(self, function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
        """Eager: the function as it is."""
        return function

    def prepare(self, arrays: Arrays) -> Callable[[], Any]:
        """The function of ``torch.nn.functional``, or autograd's backward of it."""
        torch, function = self.torch, self.function
        tensors = {name: self._tensor(array) for name, array in arrays.items() if name != "start"}
        dy = tensors.pop("dy", None)
        if not self.case.operation.is_training:

            def infer() -> Any:
                with torch.no_grad():
                    return function(tensors)

            return infer
        leaves = [tensor.requires_grad_() for tensor in tensors.values()]
        if self.case.direction == FORWARD:
            return lambda: function(tensors)
        y = function(tensors)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def results(self, result: Any) -> dict[str, Any]:
        """In memory order."""
        return {name: self._in_memory_order(tensor) for name, tensor in super().results(result).items()}

    def to_numpy(self, array: Any) -> np.ndarray:
        """In float64: NumPy alone has no bfloat16."""
        return array.detach().double().cpu().numpy()

    def _tensor(self, array: Any) -> Any:
        tensor = self.device.to_torch(self.torch, array)
        return tensor.movedim(-1, 1) if self.case.channels_last and tensor.ndim > 2 else tensor

    def _in_memory_order(self, tensor: Any) -> Any:
        return tensor.movedim(1, -1) if self.case.channels_last and tensor.ndim > 2 else tensor


class CompiledTorch(Torch):
    name = COMPILED

    def optimized(self, function: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
        """``torch.compile``, for this shape alone."""
        torch = self.torch
        # Each case is compiled on its own: after some recompilations of one function PyTorch runs it eagerly.
        torch._dynamo.reset()
        # A backward that is repeated must not reuse its inputs' memory.
        config: Any = importlib.import_module("torch._functorch.config")
        if hasattr(config, "donated_buffer"):
            config.donated_buffer = False
        return torch.compile(function, dynamic=False, fullgraph=True)


class Jax(Implementation):
    name = JAX

    def __init__(self, case: Case, device: Device) -> None:
        super().__init__(case, device)
        # JAX would take three quarters of the memory at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        self.jax = _imported("jax")
        if device.kind == "measured" and self.jax.default_backend() != "gpu":
            raise NotThereError("JAX finds no GPU")
        function = case.operation.jax
        if function is None:
            raise NotThereError("no expression in JAX")
        if case.dtype == "float64":
            raise NotThereError("JAX computes float64 in float32 by default")
        self.function = self.jax.jit(lambda arrays: function(self.jax, arrays, case.channels_last))
        self.pull_back = self.jax.jit(lambda vjp, dy: vjp(dy))
        self.wait = self.jax.block_until_ready

    def prepare(self, arrays: Arrays) -> Callable[[], Any]:
        """The jitted expression, or the jitted function that ``jax.vjp`` gives."""
        placed = {name: self._placed(array) for name, array in arrays.items() if name != "start"}
        dy = placed.pop("dy", None)
        if self.case.direction == FORWARD:
            return lambda: self.function(placed)
        _, vjp = self.jax.vjp(self.function, placed)
        return lambda: self.pull_back(vjp, dy)

    def results(self, result: Any) -> dict[str, Any]:
        """By our names."""
        if self.case.direction == FORWARD:
            return {"y": result}
        return {{"x": "dx"}.get(name, f"d{name}"): gradient for name, gradient in result[0].items()}

    def _placed(self, array: Any) -> Any:
        return self.jax.numpy.asarray(self.to_numpy(array))


class CuPy(Implementation):
    name = CUPY

    def prepare(self, arrays: Arrays) -> Callable[[], Any]:
        """The expression of CuPy's arrays, an elementary operation a kernel."""
        operation, xp = self.case.operation, self.device.xp
        function = operation.expression if self.case.direction == FORWARD else operation.gradient
        if function is None:
            raise NotThereError("no array expression")
        return lambda: function(xp, arrays, self.case.channels_last)


class Copy(Implementation):
    name = COPY

    def __init__(self, case: Case, device: Device) -> None:
        super().__init__(case, device)
        self.maker = InputMaker(device, block=2**20)

    def prepare(self, arrays: Arrays) -> Callable[[], Any]:
        """A copy that reads and writes half of the floor's bytes each."""
        size = max(16, self.case.floor_bytes // 2)
        source = self.maker.numbers((-(-size // 4),), np.float32).view(np.uint8)[:size]
        target = self.device.xp.empty_like(source)
        return lambda: self.device.copy(target, source)

    def results(self, result: Any) -> dict[str, Any]:
        """Nothing to compare."""
        return {}


#: In the order of the table's columns.
PEERS: tuple[type[Implementation], ...] = (Copy, Torch, CompiledTorch, Jax, CuPy, TwoReads)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotThereError(f"{name} is not installed ({error})") from error


def bytes_of_a_call(case: Case) -> int:
    """Distinct bytes of the arrays that a call is given and makes."""
    itemsize = DTYPES[case.dtype].itemsize
    return itemsize * (case.sizes.inputs + case.sizes.outputs)


# ---- What is right ---------------------------------------------------------------------------------------------------


# Elements of a part: a fraction of a second in float64.
_PART = 2**20
# Roundings of the accumulation dtype: sums here are trees whose leaves are sums of some hundred values:
# rounding errors, of either sign, add up to far less than this.
_ROUNDINGS = 64


@dataclass(frozen=True)
class Part:
    """A piece of a case that is computed alone.

    Attributes
    ----------
    label : str
    take : callable
        The piece of an array like x or y.
    take_channels : callable
        The piece of an array with one value a channel.
    start : int
        Flat index of its first element.
    """

    label: str
    take: Callable[[Any], Any]
    take_channels: Callable[[Any], Any]
    start: int = 0

    def take_result(self, name: str, array: Any) -> Any:
        """The piece of a result, by its name: gradients of parameters have one value a channel."""
        return (self.take_channels if name in ("dgamma", "dbeta") else self.take)(array)


def parts(case: Case) -> Iterator[Part]:
    """The first and the last piece of a case: a kernel that does not reach the end is found."""
    kind, shape = case.operation.independent, case.input_shape
    axis = {"elements": None, "images": 0, "channels": len(shape) - 1 if case.channels_last else 1}[kind]
    length = math.prod(shape) if axis is None else shape[axis]
    inner = math.prod(shape) // length
    count = max(1, min(length, _PART // inner))
    for begin in sorted({0, length - count}):
        piece = slice(begin, begin + count)
        take = partial(_along, axis, piece)
        label = f"{kind} {begin} to {piece.stop}"
        if kind == "channels":
            yield Part(label, take, partial(_along, 0, piece))
        else:
            yield Part(label, take, lambda array: array, begin * inner)


def _along(axis: int | None, piece: slice, array: Any) -> Any:
    """The piece along an axis, or of the flat array."""
    return array.reshape(-1)[piece] if axis is None else array[(slice(None),) * axis + (piece,)]


def expected(case: Case, part: Part, inputs: Arrays, to_numpy: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    """The reference's results for a part, in float64: ``y``, or ``dx`` and, if there are any, ``dgamma``, ``dbeta``,
    ``dresidual``."""
    arrays: Arrays = {"start": part.start}
    for name, value in inputs.items():
        if name != "start":
            take = part.take if name in ("x", "dy", *case.operation.like_x) else part.take_channels
            arrays[name] = to_numpy(take(value)).astype(np.float64)
    operation = case.operation
    with use_backend("reference"):
        y, saved = operation.forward(arrays, case.channels_last)
        if case.direction == FORWARD:
            return {"y": y}
        assert operation.backward is not None
        return named(operation.backward(arrays["dy"], saved))


def named(result: Any) -> dict[str, Any]:
    """What a backward returned, by name."""
    if isinstance(result, (tuple, list)):
        return dict(zip(("dx", "dgamma", "dbeta", "dresidual"), result, strict=False))
    return {"dx": result}


def error_ratio(case: Case, name: str, actual: np.ndarray, reference: np.ndarray) -> float:
    """Largest error of a result, as a part of what rounding allows; infinity for a wrong shape.

    One rounding to the dtype of the result, and some of the accumulation, relative to the largest value. Of a gradient
    that is rounded between two steps there is one rounding to the dtype more, in each of the values that are summed;
    twice the largest of them, for what it is multiplied by.
    """
    if actual.shape != reference.shape:
        return math.inf
    dtype = DTYPES[case.dtype]
    accumulate = accumulation_dtype(case.dtype)
    between = 2 * epsilon(dtype) if case.operation.rounds_gradient and case.direction == BACKWARD else 0.0
    if name in ("dgamma", "dbeta"):
        # Sums of random signs, which may cancel to nearly nothing: their errors are those of a sum of count
        # normally distributed values.
        allowed = (_ROUNDINGS * epsilon(accumulate) + between) * math.sqrt(case.sizes.inputs / case.shape[1])
        bound = np.full(reference.shape, allowed)
    else:
        largest = float(np.max(np.abs(reference), initial=1.0))
        bound = epsilon(dtype) * np.abs(reference) + (_ROUNDINGS * epsilon(accumulate) + between) * largest
    error = np.abs(actual.astype(np.float64) - reference)
    ratios = np.where(np.isnan(error), np.inf, error / bound)
    return float(np.max(ratios, initial=0.0))


def roughly_equal(case: Case, actual: np.ndarray, reference: np.ndarray) -> bool:
    """Whether another library computed the same thing, maybe in the arithmetic of the dtype itself."""
    if actual.shape != reference.shape:
        return False
    largest = float(np.max(np.abs(reference), initial=1.0))
    # Half types: some ten roundings of what may be the largest value.
    limit = max(16 * epsilon(DTYPES[case.dtype]), 1e-3) * largest
    return bool(np.all(np.abs(actual.astype(np.float64) - reference) <= limit))
