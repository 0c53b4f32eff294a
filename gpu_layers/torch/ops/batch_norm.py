"""Rows of batch norm: pure operations, and one that folds a batch into running statistics."""

from __future__ import annotations

from typing import Any

import torch

from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.running import RunningStatistics
from gpu_layers.torch import arrays
from gpu_layers.torch.activations import gradient_factor
from gpu_layers.torch.arrays import accumulation_dtype
from gpu_layers.torch.registry import define, first_result, through

_Tensor = Any
_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual"


def _new_statistics(x: _Tensor) -> torch.Tensor:
    """Of each channel: mean, variance, ``1 / sqrt(var + eps)``, weight, bias."""
    return arrays.empty((5, x.shape[1]), accumulation_dtype(x.dtype), x)


def _run(
    x: _Tensor,
    weight: _Tensor,
    bias: _Tensor,
    residual: _Tensor,
    eps: float,
    activation: str,
    channels_last: bool,
    running: tuple | None,
) -> tuple:
    if not x.numel():
        statistics = _new_statistics(x).zero_()
        statistics[2] = eps**-0.5
        if running is not None:
            _fold(_run_update, x, statistics, running)
        return arrays.empty(x.shape, x.dtype, x, channels_last), statistics
    place, dtype = arrays.here(x), accumulation_dtype(x.dtype)
    array, found = place.array, None
    if running is not None:
        mean, var, batches, momentum, skip_nonfinite = running
        if not (skip_nonfinite or momentum is None or batches is None) and mean.dtype is var.dtype is dtype:
            # Within the kernel that normalises.
            mean, var, batches = place.buffers(mean, var, batches)
            found = RunningStatistics(mean, var, batches, momentum, x.numel() // x.shape[1])
    y, statistics = place.floor.batch_norm_forward(
        array(x, channels_last),
        *place.parameters(weight, bias, dtype),
        eps,
        channels_last,
        None if residual is None else array(residual, channels_last),
        activation,
        found,
    )
    results = place.tensor(y, channels_last), place.tensor(statistics)
    if running is not None and found is None:
        _fold(_run_update, x, results[1], running)
    return results


def _fold(update: Any, x: _Tensor, statistics: _Tensor, running: tuple) -> None:
    """Fold the statistics of a batch into running ones, by an operation of its own."""
    mean, var, batches, momentum, skip_nonfinite = running
    count = x.numel() // max(x.shape[1], 1)
    update(mean, var, batches, statistics, count, momentum, skip_nonfinite)


def _folded(results: tuple, args: tuple) -> torch.Tensor:
    """The first result, once the statistics are folded into the running ones, which the operation has not got."""
    y, statistics = results
    if args[-1] is not None:
        _fold(update_statistics, args[0], statistics, args[-1])
    return y


def _fake(
    x: _Tensor,
    weight: _Tensor,
    bias: _Tensor,
    residual: _Tensor,
    eps: float,
    activation: str,
    channels_last: bool,
    running: None,
) -> tuple:
    return arrays.empty(x.shape, x.dtype, x, channels_last), _new_statistics(x)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, ctx.eps, ctx.activation, ctx.channels_last, _ = inputs
    # The gradient depends on a residual through the activation only.
    ctx.save_for_backward(x, weight, bias, None if ctx.activation == "identity" else residual, output[1])


def _backward(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple:
    return _gradients(ctx, dy, True, list(ctx.needs_input_grad[:4]))


def _gradients(ctx: Any, dy: torch.Tensor | None, training: bool, needed: list[bool]) -> tuple:
    """Of x, weight, bias and residual, as far as they are asked for."""
    if dy is None:
        return (None,) * 4
    x, weight, bias, residual, statistics = ctx.saved_tensors
    dresidual = None
    if ctx.activation == "identity" and needed[3]:
        # The gradient of a sum: no kernel is needed.
        dresidual, needed[3] = dy, False
    inputs = dy, x, weight, bias, residual, statistics, ctx.activation, training
    found: Any = (None,) * 4
    if any(needed):
        if torch.is_grad_enabled():
            found = _composite(*inputs, ctx.eps if training else None)
        else:
            found = batch_norm_backward.in_backward(*inputs, needed, ctx.channels_last)
    dx, dweight, dbias, other = found
    of_x, of_weight, of_bias, of_residual = needed
    return (
        dx if of_x else None,
        dweight if of_weight else None,
        dbias if of_bias else None,
        dresidual if dresidual is not None else other if of_residual else None,
    )


def _composite(
    dy: _Tensor,
    x: _Tensor,
    weight: _Tensor,
    bias: _Tensor,
    residual: _Tensor,
    statistics: _Tensor,
    activation: str,
    training: bool,
    eps: float | None,
) -> tuple:
    """Gradients of x, weight, bias and residual, of operations that are differentiable.

    The three-term gradient of Ioffe and Szegedy (2015); with an eps the statistics are computed from x once more, as
    they depend on it.
    """
    dtype = accumulation_dtype(x.dtype)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1 if axis != 1 else -1 for axis in range(x.dim())]
    wide, dy = x.to(dtype), dy.to(dtype)
    if eps is not None and x.numel():
        centre = wide.mean(axes, keepdim=True)
        deviation = wide - centre
        inv = (deviation.square().mean(axes, keepdim=True) + eps).rsqrt()
    else:
        deviation, inv = wide - statistics[0].reshape(shape), statistics[2].reshape(shape)
    xhat = deviation * inv
    gamma = None if weight is None else weight.to(dtype).reshape(shape)
    dz = dy
    if activation != "identity":
        z = xhat if gamma is None else xhat * gamma
        z = z if bias is None else z + bias.to(dtype).reshape(shape)
        z = z if residual is None else z + residual.to(dtype)
        slope = gradient_factor(z, activation)
        # Not by multiplying: a clipped unit passes no gradient, were it infinite.
        dz = torch.where(slope == 0, 0.0, dy * slope)
    dbeta, dgamma = dz.sum(axes), (dz * xhat).sum(axes)
    dx = dz
    if training:
        count = max(x.numel() // max(x.shape[1], 1), 1)
        dx = dz - dbeta.reshape(shape) / count - xhat * (dgamma.reshape(shape) / count)
    dx = dx * (inv if gamma is None else inv * gamma)
    return (
        dx.to(x.dtype),
        None if weight is None else dgamma.to(weight.dtype),
        dbeta if bias is None else dbeta.to(bias.dtype),
        dz.to(x.dtype),
    )


batch_norm_training = define(
    f"batch_norm_training(Tensor input, {_AFFINE}, float eps, str activation, bool channels_last) -> (Tensor, Tensor)",
    _run,
    _fake,
    _setup,
    _backward,
    # Running statistics are folded in within only where no graph is made: operations are pure.
    pack=lambda args: (*args, None),
    flat=lambda args: args[:-1],
    first=_folded,
)


def _run_inference(
    x: _Tensor,
    running_mean: _Tensor,
    running_var: _Tensor,
    weight: _Tensor,
    bias: _Tensor,
    residual: _Tensor,
    eps: float,
    activation: str,
    channels_last: bool,
) -> tuple:
    dtype = accumulation_dtype(x.dtype)
    if not x.numel():
        statistics = _new_statistics(x)
        statistics[0], statistics[1], statistics[2] = running_mean, running_var, (running_var + eps).rsqrt()
        return arrays.empty(x.shape, x.dtype, x, channels_last), statistics
    place = arrays.here(x)
    array = place.array
    # The statistics that come back are copies: what is updated after this forward does not change its backward.
    y, statistics = place.floor.batch_norm_inference(
        array(x, channels_last),
        array(running_mean.to(dtype)),
        array(running_var.to(dtype)),
        *place.parameters(weight, bias, dtype),
        eps,
        channels_last,
        None if residual is None else array(residual, channels_last),
        activation,
    )
    return place.tensor(y, channels_last), place.tensor(statistics)


def _fake_inference(
    x: _Tensor,
    running_mean: _Tensor,
    running_var: _Tensor,
    weight: _Tensor,
    bias: _Tensor,
    residual: _Tensor,
    eps: float,
    activation: str,
    channels_last: bool,
) -> tuple:
    return arrays.empty(x.shape, x.dtype, x, channels_last), _new_statistics(x)


def _setup_inference(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, _, _, weight, bias, residual, *numbers = inputs
    _setup(ctx, (x, weight, bias, residual, *numbers, None), output)


def _backward_inference(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple:
    of_x, _, _, *others = ctx.needs_input_grad[:6]
    dx, *found = _gradients(ctx, dy, False, [of_x, *others])
    return dx, None, None, *found


batch_norm_inference = define(
    f"batch_norm_inference(Tensor input, Tensor running_mean, Tensor running_var, {_AFFINE}, float eps, "
    "str activation, bool channels_last) -> (Tensor, Tensor)",
    _run_inference,
    _fake_inference,
    _setup_inference,
    _backward_inference,
    first=first_result,
)


def _found_gradients(
    dy: _Tensor,
    x: _Tensor,
    weight: _Tensor,
    bias: _Tensor,
    residual: _Tensor,
    statistics: _Tensor,
    activation: str,
    training: bool,
    needed: list[bool],
    channels_last: bool,
) -> tuple:
    """Gradients of x, weight, bias and residual; what is not needed may be None."""
    of_x, of_weight, of_bias, of_residual = needed
    if not x.numel():
        dx, dweight, dbias, dresidual = _gradients_like(x, weight, bias, needed, channels_last)
        return dx, dweight.zero_(), dbias.zero_(), dresidual
    place = arrays.here(x)
    floor, array = place.floor, place.array
    added = None if residual is None else array(residual, channels_last)
    gradient = array(dy, channels_last)
    # Without a number of writes: autograd notices what is written to.
    saved = BatchNormSaved(array(x, channels_last), array(statistics), channels_last, added, activation, 0)
    if not (of_x or of_residual):
        found = (None, *floor.batch_norm_gradient_sums(gradient, saved), None)
    elif training:
        found = floor.batch_norm_backward(gradient, saved)
    elif of_weight or of_bias:
        found = floor.batch_norm_inference_backward(gradient, saved)
    else:
        nothing = array(torch.zeros_like(statistics[0]))
        dx, dresidual = floor.batch_norm_input_gradient(gradient, saved, nothing, nothing, 1)
        found = dx, None, None, dresidual
    dx, dgamma, dbeta, dresidual = found
    dweight, dbias = place.tensor(dgamma) if of_weight else None, place.tensor(dbeta) if of_bias else None
    if weight is not None and dweight is not None and weight.dtype is not dweight.dtype:
        dweight = dweight.to(weight.dtype)
    if bias is not None and dbias is not None and bias.dtype is not dbias.dtype:
        dbias = dbias.to(bias.dtype)
    return (
        place.tensor(dx, channels_last) if of_x else None,
        dweight,
        dbias,
        place.tensor(dresidual, channels_last) if of_residual else None,
    )


def _run_backward(dy: _Tensor, x: _Tensor, weight: _Tensor, bias: _Tensor, *rest: Any) -> tuple:
    # An operation of the dispatcher has no results that are None.
    found = _found_gradients(dy, x, weight, bias, *rest)
    others = _gradients_like(x, weight, bias, [False] * 4, False)
    return tuple(
        one if need and one is not None else other for one, need, other in zip(found, rest[-2], others, strict=True)
    )


def _gradients_like(x: _Tensor, weight: _Tensor, bias: _Tensor, needed: list[bool], channels_last: bool) -> tuple:
    """Tensors for the four gradients; empty ones for those that were not requested."""

    def of_channels(values: _Tensor, need: bool) -> torch.Tensor:
        dtype = accumulation_dtype(x.dtype) if values is None else values.dtype
        return arrays.empty((x.shape[1],) if need else (0,), dtype, x)

    def of_input(need: bool) -> torch.Tensor:
        return arrays.empty(x.shape, x.dtype, x, channels_last) if need else arrays.empty((0,), x.dtype, x)

    return of_input(needed[0]), of_channels(weight, needed[1]), of_channels(bias, needed[2]), of_input(needed[3])


def _fake_backward(
    dy: _Tensor,
    x: _Tensor,
    weight: _Tensor,
    bias: _Tensor,
    residual: _Tensor,
    statistics: _Tensor,
    activation: str,
    training: bool,
    needed: list[bool],
    channels_last: bool,
) -> tuple:
    return _gradients_like(x, weight, bias, needed, channels_last)


def _setup_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.activation, ctx.training, ctx.needed, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, *gradients: Any) -> tuple:
    *inputs, statistics = ctx.saved_tensors

    def composite(dy: Any, x: Any, weight: Any, bias: Any, residual: Any) -> tuple:
        # The statistics are arguments here, whatever they were computed from.
        found = _composite(dy, x, weight, bias, residual, statistics, ctx.activation, ctx.training, None)
        return tuple(one if need else None for one, need in zip(found, ctx.needed, strict=True))

    needed = ctx.needs_input_grad[:5]
    return tuple(through(composite, tuple(inputs), needed, gradients))


batch_norm_backward = define(
    f"batch_norm_backward(Tensor grad, Tensor input, {_AFFINE}, Tensor statistics, str activation, "
    "bool training, bool[] needed, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    _setup_backward,
    _backward_backward,
    _found_gradients,
)


def _run_update(
    running_mean: _Tensor,
    running_var: _Tensor,
    num_batches_tracked: _Tensor,
    statistics: _Tensor,
    count: int,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``; the variance of the batch is the unbiased one.

    Without a momentum the average is cumulative: 1 over the number of batches, read on the device. As torch's own, the
    update does not count as a change for autograd's version counters.
    """
    batches = statistics.new_zeros((), dtype=torch.int64) if num_batches_tracked is None else num_batches_tracked
    changed = running_mean, running_var, batches
    # Half types are averaged in float32 and rounded once.
    wide = [one if one.dtype is dtype else one.to(dtype) for one, dtype in zip(changed, _wide(statistics), strict=True)]
    place = arrays.here(statistics)
    mean, var, number = map(place.array, wide)
    running = RunningStatistics(mean, var, number, momentum, count)
    place.floor.batch_norm_fold(place.array(statistics), running, finite_only=skip_nonfinite)
    for one, found in zip(changed, wide, strict=True):
        if found is not one:
            one.data.copy_(found)


def _wide(statistics: _Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """dtypes of running mean and variance and of the number of batches, as kernels take them."""
    return statistics.dtype, statistics.dtype, torch.int64


def _fake_update(*_: Any) -> None:
    return None


update_statistics = define(
    "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor statistics, SymInt count, float? momentum, bool skip_nonfinite) -> ()",
    _run_update,
    _fake_update,
)
