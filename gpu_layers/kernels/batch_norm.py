"""Launching ``batch_norm_resident.cu`` where a plan says so, else ``batch_norm.cu``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpu_layers.kernels.arrays import delivered, destination, empty, ready
from gpu_layers.kernels.batch_norm_passes import (
    EXACT_GRADIENT,
    OF_CHANNELS,
    SLOPED_ACTIVATIONS,
    Pass,
    ResidentPass,
    Rule,
    merge_gradients,
    merge_statistics,
    sums_of_channels,
    workspace,
)
from gpu_layers.kernels.batch_norm_plan import Plan, backward_plan, elementwise_plan, forward_plan
from gpu_layers.reference.batch_norm import statistics_dtype

# ``Fusion`` of ``batch_norm_rules.cuh``.
_FUSIONS = tuple({"Fused": name} for name in ("kPlain", "kSloped", "kCurved"))
_FUSED: dict[str, Any] = {"of_planes": _FUSIONS, "of_rows": _FUSIONS}
_RULE = f"{OF_CHANNELS}, const T* residual, int activation"
_STATISTICS = Pass(
    "batch_norm.cu", "batch_norm_statistics", "const T* x, A* partial_moments, A* mean, A* var, A* inv_std, A eps"
)
_NORMALIZE = Pass("batch_norm.cu", "batch_norm_normalize", f"const T* x, {_RULE}, T* y", **_FUSED)
_GRADIENT_SUMS = Pass(
    "batch_norm.cu",
    "batch_norm_gradient_sums",
    f"const T* dy, const T* x, {_RULE}, A* partial_sums, A* dgamma, A* dbeta",
    **_FUSED,
)
_INPUT_GRADIENT = Pass(
    "batch_norm.cu",
    "batch_norm_input_gradient",
    f"const T* dy, const T* x, {_RULE}, const A* dgamma, const A* dbeta, T* dx, T* dresidual, A inv_count",
    **_FUSED,
)
_FORWARD_RESIDENT = ResidentPass(
    "batch_norm_resident.cu",
    "batch_norm_forward_resident",
    "const T* x, const A* gamma, const A* beta, const T* residual, int activation, T* y, A* partial_moments, A* mean, "
    "A* var, A* inv_std, unsigned int* arrived, A eps",
)
_BACKWARD_RESIDENT = ResidentPass(
    "batch_norm_resident.cu",
    "batch_norm_backward_resident",
    f"const T* dy, const T* x, {_RULE}, A* partial_sums, A* dgamma, A* dbeta, T* dx, T* dresidual, "
    "unsigned int* arrived, A inv_count, int places_of_x",
)


def _arguments(rule: Rule) -> tuple[Any, ...]:
    return *rule.of_channels, rule.residual, rule.number


def _fusion(rule: Rule) -> str:
    if rule.activation not in SLOPED_ACTIVATIONS:
        return "kCurved"
    return "kPlain" if rule.residual is None and rule.activation == "identity" else "kSloped"


def _of_inputs(x: Any, rule: Rule, out: tuple[Any | None, Any | None] = (None, None)) -> tuple[Any, Any | None]:
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
    rule = Rule.of(mean, inv_std, gamma, beta, residual, activation)
    partial_moments, y = workspace(plan, 4, dtype, x), destination(out, x)
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
    _statistics(plan, x, (workspace(plan, 4, dtype, x), mean, var, inv_std, eps))
    return mean, var, inv_std


def _statistics(plan: Plan, x: Any, results: tuple[Any, ...]) -> None:
    _STATISTICS.launch(plan, x, (x, *results))
    merge_statistics(plan, results)


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
    _normalize(x, Rule.of(mean, inv_std, gamma, beta, residual, activation), y, channels_last)
    return y


def _normalize(x: Any, rule: Rule, y: Any, channels_last: bool) -> None:
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    _NORMALIZE.launch(plan, x, (x, *_arguments(rule), y), Fused=_fusion(rule))


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
    dy, x, rule = ready(dy), ready(x), Rule.of(mean, inv_std, gamma, beta, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = sums_of_channels(plan, x), _of_inputs(x, rule, out)
    arguments, last = (dy, x, *_arguments(rule), *sums, *inputs), (1 / plan.count, plan.places)
    if activation not in EXACT_GRADIENT or not _BACKWARD_RESIDENT.run(plan, x, arguments, last):
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
    dy, x, rule = ready(dy), ready(x), Rule.of(mean, inv_std, gamma, beta, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums = sums_of_channels(plan, x)
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
    dy, x, rule = ready(dy), ready(x), Rule.of(mean, inv_std, gamma, beta, residual, activation)
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
    dy, x, rule = ready(dy), ready(x), Rule.of(mean, inv_std, gamma, beta, residual, activation)
    plan = backward_plan(x.shape, x.dtype.itemsize, channels_last)
    sums, inputs = sums_of_channels(plan, x), _of_inputs(x, rule)
    _parameter_gradients(plan, dy, x, rule, sums)
    if _fusion(rule) != "kPlain":
        _input_gradients(dy, x, rule, (None, None), plan.count, inputs, channels_last)
    else:
        # dx = gamma * inv_std * dy is the normalisation of dy with mean 0 and beta 0: x need not be read.
        _normalize(dy, replace(rule, mean=None, beta=None), inputs[0], channels_last)
    return inputs[0], *sums[1:], inputs[1]


def _parameter_gradients(plan: Plan, dy: Any, x: Any, rule: Rule, sums: tuple[Any | None, Any, Any]) -> None:
    _GRADIENT_SUMS.launch(plan, x, (dy, x, *_arguments(rule), *sums), Fused=_fusion(rule))
    merge_gradients(plan, rule, sums)


def _input_gradients(
    dy: Any,
    x: Any,
    rule: Rule,
    sums: tuple[Any | None, Any | None],
    count: int,
    inputs: tuple[Any, Any | None],
    channels_last: bool,
) -> None:
    """dx and dresidual, from dgamma and dbeta of all ``count`` values, or Nones where the statistics were given."""
    plan = elementwise_plan(x.shape, x.dtype.itemsize, channels_last)
    arguments = (dy, x, *_arguments(rule), *sums, *inputs, 1 / count)
    _INPUT_GRADIENT.launch(plan, x, arguments, Fused=_fusion(rule))
