"""Launching ``batch_norm_resident.cu`` where a plan says so, else ``batch_norm.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpu_layers.kernels.activation_dropout import NUMBERS
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
from gpu_layers.kernels.batch_norm_plan import STRUCTS, THREADS, Plan, backward_plan, elementwise_plan, forward_plan
from gpu_layers.reference.batch_norm import statistics_dtype
from gpu_layers.runtime.kernel import FLOAT_DTYPES, Kernel, KernelTemplate, c_name, combinations
from gpu_layers.runtime.launch import launch, resident_blocks
from gpu_layers.runtime.limits import limits

# ``kNoActivation`` of ``activation.cuh``.
_NO_ACTIVATION = -1
#: Those of ``SlopedActivation`` there.
SLOPED_ACTIVATIONS = ("identity", "relu", "leaky_relu")
# Those whose gradient is dy or 0, which the type of dy holds.
_EXACT_GRADIENT = ("identity", "relu")
_WARP = 32
# ``Fusion`` of ``batch_norm_rules.cuh``.
_FUSIONS = ("kPlain", "kSloped", "kCurved")


def activation_number(activation: str) -> int:
    """What kernels know an activation by."""
    return NUMBERS.get(activation, _NO_ACTIVATION)


class _Pass:
    """One kernel in both layouts.

    Parameters
    ----------
    source, name, parameters
        Of its templates, whose names end in ``_planes`` and ``_rows`` and whose parameters in a layout.
    fusions : sequence of str
        Values of ``Fused``, if that is a template parameter.
    single_channels : bool
        Whether rows of channels that make no vectors are taken too.
    initialised : sequence of str
        As of :class:`KernelTemplate`.
    """

    def __init__(
        self,
        source: str,
        name: str,
        parameters: str,
        fusions: Sequence[str] = (),
        single_channels: bool = True,
        initialised: Sequence[str] = (),
    ) -> None:
        fused: list[dict[str, str]] = [{"Fused": fusion} for fusion in fusions] or [{}]
        every = [{"T": element, **fusion} for element in ELEMENT_TYPES for fusion in fused]
        each_width = [
            {"T": c_name(dtype), "Width": str(width), **fusion}
            for dtype in FLOAT_DTYPES
            for width in ((vector_width(dtype), 1) if single_channels else (vector_width(dtype),))
            for fusion in fused
        ]
        planes, rows = f"{parameters}, PlaneLayout layout", f"{parameters}, RowLayout layout"
        self._planes = KernelTemplate(source, f"{name}_planes", planes, every, STRUCTS, initialised)
        self._rows = KernelTemplate(source, f"{name}_rows", rows, each_width, STRUCTS, initialised)

    def kernel(self, element: str, width: int | None, **fused: str) -> Kernel:
        """The kernel for rows, of this many channels a thread, or for planes."""
        return self._planes(T=element, **fused) if width is None else self._rows(T=element, Width=str(width), **fused)


_OF_CHANNELS = "const A* mean, const A* inv_std, const A* gamma, const A* beta, const T* residual, int activation"
_STATISTICS = _Pass(
    "batch_norm.cu", "batch_norm_statistics", "const T* x, A* partial_moments, A* mean, A* var, A* inv_std, A eps"
)
_NORMALIZE = _Pass("batch_norm.cu", "batch_norm_normalize", f"const T* x, {_OF_CHANNELS}, T* y", _FUSIONS)
_GRADIENT_SUMS = _Pass(
    "batch_norm.cu",
    "batch_norm_gradient_sums",
    f"const T* dy, const T* x, {_OF_CHANNELS}, A* partial_sums, A* dgamma, A* dbeta",
    _FUSIONS,
)
_INPUT_GRADIENT = _Pass(
    "batch_norm.cu",
    "batch_norm_input_gradient",
    f"const T* dy, const T* x, {_OF_CHANNELS}, const A* dgamma, const A* dbeta, T* dx, T* dresidual, A inv_count",
    _FUSIONS,
)
_MERGE_STATISTICS = KernelTemplate(
    "batch_norm.cu",
    "batch_norm_merge_statistics",
    "const A* partial_moments, A* mean, A* var, A* inv_std, A eps, long long channels, long long parts",
    combinations(A=ACCUMULATE_TYPES),
)
_MERGE_GRADIENTS = KernelTemplate(
    "batch_norm.cu",
    "batch_norm_merge_gradients",
    "const A* partial_sums, const A* inv_std, A* dgamma, A* dbeta, long long channels, long long parts",
    combinations(A=ACCUMULATE_TYPES),
)


def _run(plan: Plan, of: _Pass, element: str, arguments: tuple[Any, ...], **fused: str) -> None:
    launch(of.kernel(element, plan.width, **fused), plan.blocks, plan.block, (*arguments, plan.layout))


def _merge(plan: Plan, template: KernelTemplate, dtype: np.dtype, arguments: tuple[Any, ...]) -> None:
    """Merge the parts of each channel, if there are several."""
    if plan.parts > 1:
        blocks = -(-plan.channels // (THREADS // _WARP))
        launch(template(A=c_name(dtype)), blocks, THREADS, (*arguments, plan.channels, plan.parts))


def _workspace(plan: Plan, numbers: int, dtype: np.dtype, like: Any) -> Any | None:
    """Where the parts of each channel leave this many numbers each, if there are several."""
    return None if plan.parts == 1 else empty((plan.channels, plan.parts, numbers), dtype, like)


class _ResidentPass(_Pass):
    """A kernel that reads once, in both layouts.

    ``arrived`` in the parameters counts the blocks of each group.
    """

    def __init__(self, source: str, name: str, parameters: str) -> None:
        super().__init__(source, name, parameters, single_channels=False, initialised=("arrived",))

    def run(self, plan: Plan, x: Any, before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
        """Launch it, with these arguments before and after ``arrived``; False where it cannot be resident."""
        if plan.places is None:
            return False
        kernel = self.kernel(element_type(x), plan.width)
        # With one part nobody waits for anybody.
        cooperative = plan.parts > 1
        resident = resident_blocks(kernel, plan.block, plan.shared_bytes, x, cooperative=cooperative)
        if resident < plan.parts:
            return False
        if cooperative:
            groups = min(plan.tiles, resident // plan.parts)
            arrived = empty((groups,), np.uint32, x)
            arrived.fill(0)
        else:
            groups, arrived = min(plan.tiles, limits().max_blocks), None
        launch(
            kernel,
            groups * plan.parts,
            plan.block,
            (*before, arrived, *after, plan.layout),
            shared_bytes=plan.shared_bytes,
            cooperative=cooperative,
        )
        return True


_FORWARD_RESIDENT = _ResidentPass(
    "batch_norm_resident.cu",
    "batch_norm_forward_resident",
    "const T* x, const A* gamma, const A* beta, const T* residual, int activation, T* y, A* partial_moments, A* mean, "
    "A* var, A* inv_std, unsigned int* arrived, A eps",
)
_BACKWARD_RESIDENT = _ResidentPass(
    "batch_norm_resident.cu",
    "batch_norm_backward_resident",
    f"const T* dy, const T* x, {_OF_CHANNELS}, A* partial_sums, A* dgamma, A* dbeta, T* dx, T* dresidual, "
    "unsigned int* arrived, A inv_count, int places_of_x",
)


@dataclass(frozen=True)
class _Rule:
    """What gives y from x: the channels' numbers, and what is fused."""

    mean: Any
    inv_std: Any
    gamma: Any | None
    beta: Any | None
    residual: Any | None
    activation: str

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.mean, self.inv_std, self.gamma, self.beta, self.residual, self.number

    @property
    def number(self) -> int:
        """Of the activation."""
        return activation_number(self.activation)

    @property
    def fused(self) -> dict[str, str]:
        """The template argument."""
        if self.activation not in SLOPED_ACTIVATIONS:
            return {"Fused": "kCurved"}
        return {"Fused": "kPlain" if self.residual is None and self.activation == "identity" else "kSloped"}


def _rule(mean: Any, inv_std: Any, gamma: Any | None, beta: Any | None, residual: Any | None, activation: str) -> _Rule:
    gamma, beta, residual = (None if array is None else ready(array) for array in (gamma, beta, residual))
    return _Rule(ready(mean), ready(inv_std), gamma, beta, residual, activation)


def _sums(plan: Plan, x: Any) -> tuple[Any | None, Any, Any]:
    """Where the parts of each channel leave their sums, if there are several; dgamma, dbeta."""
    dtype = statistics_dtype(x.dtype)
    dgamma, dbeta = (empty((plan.channels,), dtype, x) for _ in range(2))
    return _workspace(plan, 2, dtype, x), dgamma, dbeta


def _of_inputs(x: Any, rule: _Rule, out: tuple[Any | None, Any | None] = (None, None)) -> tuple[Any, Any | None]:
    """Where dx and dresidual go, if there is a residual."""
    return destination(out[0], x), None if rule.residual is None else destination(out[1], x)


def batch_norm_forward(
    x: Any,
    gamma: Any | None,
    beta: Any | None,
    eps: float,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
    out: Any | None = None,
) -> tuple[Any, Any, Any, Any]:
    """``gpu_layers.reference.batch_norm_forward``, as kernels."""
    x = ready(x)
    plan, dtype = forward_plan(x.shape, x.dtype.itemsize, channels_last), statistics_dtype(x.dtype)
    mean, var, inv_std = (empty((plan.channels,), dtype, x) for _ in range(3))
    rule = _rule(mean, inv_std, gamma, beta, residual, activation)
    partial_moments, y = _workspace(plan, 4, dtype, x), destination(out, x)
    if activation in SLOPED_ACTIVATIONS:
        fused = (rule.gamma, rule.beta, rule.residual, rule.number)
        if _FORWARD_RESIDENT.run(plan, x, (x, *fused, y, partial_moments, mean, var, inv_std), (eps,)):
            return delivered(y, out), mean, var, inv_std
    _statistics(plan, x, (partial_moments, mean, var, inv_std, eps))
    _normalize(x, rule, y, channels_last)
    return delivered(y, out), mean, var, inv_std


def batch_norm_statistics(x: Any, eps: float, channels_last: bool = False) -> tuple[Any, Any, Any]:
    """``gpu_layers.reference.batch_norm_statistics``, as a kernel that reads x once and writes nothing like it."""
    x = ready(x)
    plan, dtype = forward_plan(x.shape, x.dtype.itemsize, channels_last), statistics_dtype(x.dtype)
    mean, var, inv_std = (empty((plan.channels,), dtype, x) for _ in range(3))
    _statistics(plan, x, (_workspace(plan, 4, dtype, x), mean, var, inv_std, eps))
    return mean, var, inv_std


def _statistics(plan: Plan, x: Any, results: tuple[Any, ...]) -> None:
    _run(plan, _STATISTICS, element_type(x), (x, *results))
    _merge(plan, _MERGE_STATISTICS, statistics_dtype(x.dtype), results)


def batch_norm_inference(
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any | None,
    beta: Any | None,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> Any:
    """``gpu_layers.reference.batch_norm_inference``, as a kernel."""
    x = ready(x)
    y = empty(x.shape, x.dtype, x)
    _normalize(x, _rule(mean, inv_std, gamma, beta, residual, activation), y, channels_last)
    return y


def _normalize(x: Any, rule: _Rule, y: Any, channels_last: bool) -> None:
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    _run(plan, _NORMALIZE, element_type(x), (x, *rule.arguments, y), **rule.fused)


def batch_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any | None,
    beta: Any | None = None,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
    out: tuple[Any | None, Any | None] = (None, None),
) -> tuple[Any, Any, Any, Any | None]:
    """``gpu_layers.reference.batch_norm_backward``, as kernels."""
    dy, x, rule = ready(dy), ready(x), _rule(mean, inv_std, gamma, beta, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = _sums(plan, x), _of_inputs(x, rule, out)
    arguments, last = (dy, x, *rule.arguments, *sums, *inputs), (1 / plan.count, plan.places)
    if activation not in _EXACT_GRADIENT or not _BACKWARD_RESIDENT.run(plan, x, arguments, last):
        _parameter_gradients(plan, dy, x, rule, sums)
        _input_gradients(dy, x, rule, sums[1:], plan.count, inputs, channels_last)
    dx, dresidual = (delivered(one, place) for one, place in zip(inputs, out, strict=True))
    return dx, *sums[1:], dresidual


def batch_norm_gradient_sums(
    dy: Any,
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any | None,
    beta: Any | None = None,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> tuple[Any, Any]:
    """``gpu_layers.reference.batch_norm_gradient_sums``, as a kernel."""
    dy, x, rule = ready(dy), ready(x), _rule(mean, inv_std, gamma, beta, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums = _sums(plan, x)
    _parameter_gradients(plan, dy, x, rule, sums)
    return sums[1:]


def batch_norm_input_gradient(
    dy: Any,
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any | None,
    beta: Any | None,
    dgamma: Any,
    dbeta: Any,
    count: int,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> tuple[Any, Any | None]:
    """``gpu_layers.reference.batch_norm_input_gradient``, as a kernel."""
    dy, x, rule = ready(dy), ready(x), _rule(mean, inv_std, gamma, beta, residual, activation)
    inputs = _of_inputs(x, rule)
    _input_gradients(dy, x, rule, (ready(dgamma), ready(dbeta)), count, inputs, channels_last)
    return inputs


def batch_norm_inference_backward(
    dy: Any,
    x: Any,
    mean: Any,
    inv_std: Any,
    gamma: Any | None,
    beta: Any | None = None,
    channels_last: bool = False,
    residual: Any | None = None,
    activation: str = "identity",
) -> tuple[Any, Any, Any, Any | None]:
    """``gpu_layers.reference.batch_norm_inference_backward``, as kernels."""
    dy, x, rule = ready(dy), ready(x), _rule(mean, inv_std, gamma, beta, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = _sums(plan, x), _of_inputs(x, rule)
    _parameter_gradients(plan, dy, x, rule, sums)
    if rule.fused["Fused"] != "kPlain":
        _input_gradients(dy, x, rule, (None, None), plan.count, inputs, channels_last)
    else:
        # dx = gamma * inv_std * dy is the normalisation of dy with mean 0 and beta 0: x need not be read.
        _normalize(dy, replace(rule, mean=None, beta=None), inputs[0], channels_last)
    return inputs[0], *sums[1:], inputs[1]


def _parameter_gradients(plan: Plan, dy: Any, x: Any, rule: _Rule, sums: tuple[Any | None, Any, Any]) -> None:
    partial_sums, dgamma, dbeta = sums
    _run(plan, _GRADIENT_SUMS, element_type(x), (dy, x, *rule.arguments, *sums), **rule.fused)
    _merge(plan, _MERGE_GRADIENTS, statistics_dtype(x.dtype), (partial_sums, rule.inv_std, dgamma, dbeta))


def _input_gradients(
    dy: Any,
    x: Any,
    rule: _Rule,
    sums: tuple[Any | None, Any | None],
    count: int,
    inputs: tuple[Any, Any | None],
    channels_last: bool,
) -> None:
    """dx and dresidual, from dgamma and dbeta of all ``count`` values, or Nones where the statistics were given."""
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    arguments = (dy, x, *rule.arguments, *sums, *inputs, 1 / count)
    _run(plan, _INPUT_GRADIENT, element_type(x), arguments, **rule.fused)
