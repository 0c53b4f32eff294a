"""Rows of batch norm: pure operations, and one that folds a batch into running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.core.running import RunningStatistics
from gpu_layers.torch import arrays
from gpu_layers.torch.activations import activation_gradient
from gpu_layers.torch.arrays import accumulation_dtype
from gpu_layers.torch.checks import check_statistics
from gpu_layers.torch.random import is_recomputation
from gpu_layers.torch.registry import define, first_result, is_plain, keep, kept, through

_Optional: TypeAlias = torch.Tensor | None
_COUNTER = torch.int64  # of batches, as kernels take it
_AFFINE = "Tensor? weight, Tensor? bias, Tensor? residual"


def _new_statistics(x: torch.Tensor) -> torch.Tensor:
    """Of each channel: mean, variance, ``1 / sqrt(var + eps)``, weight, bias."""
    return arrays.empty((5, x.shape[1]), accumulation_dtype(x.dtype), x)


def _as_input(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """In the input's dtype, which it has not under autocast: what is saved is the residual itself, and no copy."""
    return residual if residual.dtype is x.dtype else residual.to(x.dtype)


def _statistics_of_nothing(x: torch.Tensor, weight: _Optional, bias: _Optional) -> torch.Tensor:
    statistics = _new_statistics(x).zero_()
    statistics[3] = 1.0 if weight is None else weight
    if bias is not None:
        statistics[4] = bias
    return statistics


def _raw(x: torch.Tensor, weight: _Optional, bias: _Optional, residual: _Optional, numbers: tuple) -> tuple:
    eps, activation, channels_last, running = numbers
    if not x.numel():
        statistics = _statistics_of_nothing(x, weight, bias)
        statistics[2] = eps**-0.5
        if running is not None:
            _fold(_run_update, x, statistics, running)
        return arrays.empty(x.shape, x.dtype, x, channels_last), statistics
    place, dtype = arrays.here(x), accumulation_dtype(x.dtype)
    array, found = place.array, None
    if residual is not None:
        residual = _as_input(residual, x)
    if running is not None:
        mean, var, batches, momentum, skip_nonfinite = running
        fits = batches is not None and mean.dtype is var.dtype is dtype
        if fits and batches.dtype is _COUNTER and batches.get_device() == x.get_device():
            # Within the kernel that finds the statistics.
            mean, var, batches = place.buffers(mean, var, batches)
            count = x.numel() // x.shape[1]
            found = RunningStatistics(mean, var, batches, momentum, count, finite_only=skip_nonfinite)
    y, statistics = place.floor.batch_norm_forward(
        array(x, channels_last),
        *place.parameters(weight, bias, dtype),
        eps,
        channels_last,
        None if residual is None else array(residual, channels_last),
        activation,
        found,
    )
    if running is not None and found is None:
        _fold(_run_update, x, place.tensor(statistics), running)
    return place.tensor(y, channels_last), place.kept(statistics)


def _run(*args: Any) -> tuple:
    y, statistics = _raw(*args)
    return y, arrays.tensor_of(statistics)


def _fold(update: Any, x: torch.Tensor, statistics: torch.Tensor, running: tuple) -> None:
    """Fold the statistics of a batch into running ones, by an operation of its own."""
    mean, var, batches, momentum, skip_nonfinite = running
    count = x.numel() // max(x.shape[1], 1)
    update(mean, var, batches, statistics, (count, momentum, skip_nonfinite))


def _folded(results: tuple, args: tuple) -> torch.Tensor:
    """The first result, once the statistics are folded into the running ones, which the operation has not got."""
    y, statistics = results
    *_, running = args[-1]
    if running is not None:
        _fold(update_statistics, args[0], statistics, running)
    return y


def _fake(x: torch.Tensor, weight: _Optional, bias: _Optional, residual: _Optional, numbers: tuple) -> tuple:
    return arrays.empty(x.shape, x.dtype, x, numbers[2]), _new_statistics(x)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, (_, activation, *_) = inputs
    # The gradient depends on a residual through the activation only.
    keep(ctx, x, weight, bias, None if activation == "identity" else residual, last=output[1])


def _backward(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple:
    return _gradients(ctx, dy, True, ctx.needs_input_grad[:4])


def _gradients(ctx: Any, dy: torch.Tensor | None, training: bool, needed: tuple) -> tuple:
    """Of x, weight, bias and residual, as far as they are asked for."""
    if dy is None:
        return (None,) * 4
    eps, activation, channels_last, *_ = ctx.numbers
    x, weight, bias, residual, statistics = kept(ctx)
    dresidual = None
    if activation == "identity" and needed[3]:
        # The gradient of a sum: no kernel is needed.
        dresidual, needed = arrays.in_format(dy, channels_last), (*needed[:3], False)
    found: Any = (None,) * 4
    if True in needed:
        if is_plain(dy):
            numbers = activation, training, needed, channels_last
            found = _found_gradients(dy, x, weight, bias, residual, statistics, numbers)
        else:
            given = dy, x, weight, bias, residual, arrays.tensor_of(statistics)
            if torch.is_grad_enabled():
                found = composite_gradients(*given, activation, training, eps if training else None)
            else:
                found = batch_norm_backward(*given, (activation, training, list(needed), channels_last))
            found = tuple([one if need else None for one, need in zip(found, needed, strict=True)])
    return found if dresidual is None else (*found[:3], dresidual)


def composite_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    statistics: torch.Tensor,
    activation: str,
    training: bool,
    eps: float | None,
    mean_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple:
    """Gradients of x, weight, bias and residual, of operations that are differentiable.

    The three-term gradient of Ioffe and Szegedy (2015); with an eps the statistics are computed from x once more, as
    they depend on it. ``mean_of`` is the mean of sums over a channel, where x is not all that is normalised together.
    """
    dtype = accumulation_dtype(x.dtype)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    # Not -1, which vmap of no samples could not tell.
    shape = [x.shape[1] if axis == 1 else 1 for axis in range(x.dim())]
    wide, dy = x.to(dtype), dy.to(dtype)
    count = max(x.numel() // max(x.shape[1], 1), 1)
    mean_of = mean_of or (lambda sums: sums / count)
    if eps is not None:
        deviation = wide - mean_of(wide.sum(axes)).reshape(shape)
        inv = (mean_of(deviation.square().sum(axes)).reshape(shape) + eps).rsqrt()
    else:
        deviation, inv = wide - statistics[0].reshape(shape), statistics[2].reshape(shape)
    xhat = deviation * inv
    gamma = None if weight is None else weight.to(dtype).reshape(shape)
    dz = dy
    if activation != "identity":
        z = xhat if gamma is None else xhat * gamma
        z = z if bias is None else z + bias.to(dtype).reshape(shape)
        z = z if residual is None else z + _as_input(residual, x).to(dtype)
        dz = activation_gradient(dy, z, activation)
    dbeta, dgamma = dz.sum(axes), (dz * xhat).sum(axes)
    dx = dz
    if training:
        dx = dz - mean_of(dbeta).reshape(shape) - xhat * mean_of(dgamma).reshape(shape)
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
    _backward,
    _save,
    # Running statistics are folded in within only where no graph is made: operations are pure.
    pack=lambda tensors, numbers: (*numbers, None),
    unpack=lambda numbers: numbers[:-1],
    first=_folded,
    raw=_raw,
)


def _raw_inference(
    x: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    numbers: tuple,
) -> tuple:
    eps, activation, channels_last = numbers
    dtype = accumulation_dtype(x.dtype)
    if not x.numel():
        statistics = _statistics_of_nothing(x, weight, bias)
        statistics[0], statistics[1], statistics[2] = running_mean, running_var, (running_var + eps).rsqrt()
        return arrays.empty(x.shape, x.dtype, x, channels_last), statistics
    place = arrays.here(x)
    array = place.array
    if residual is not None:
        residual = _as_input(residual, x)
    # The statistics that come back are copies: what is updated after this forward does not change its backward.
    y, statistics = place.floor.batch_norm_inference(
        array(x, channels_last),
        *place.parameters(running_mean, running_var, dtype),
        *place.parameters(weight, bias, dtype),
        eps,
        channels_last,
        None if residual is None else array(residual, channels_last),
        activation,
    )
    return place.tensor(y, channels_last), place.kept(statistics)


def _run_inference(*args: Any) -> tuple:
    y, statistics = _raw_inference(*args)
    return y, arrays.tensor_of(statistics)


def _fake_inference(x: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor, *others: Any) -> tuple:
    return _fake(x, *others)


def _save_inference(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, running_mean, running_var, *others = inputs
    check_statistics(running_mean, running_var)
    _save(ctx, (x, *others), output)


def _backward_inference(ctx: Any, dy: torch.Tensor | None, *_: Any) -> tuple:
    of_x, _, _, *others = ctx.needs_input_grad[:6]
    dx, *found = _gradients(ctx, dy, False, (of_x, *others))
    return dx, None, None, *found


batch_norm_inference = define(
    f"batch_norm_inference(Tensor input, Tensor running_mean, Tensor running_var, {_AFFINE}, float eps, "
    "str activation, bool channels_last) -> (Tensor, Tensor)",
    _run_inference,
    _fake_inference,
    _backward_inference,
    _save_inference,
    first=first_result,
    raw=_raw_inference,
)


def _found_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    statistics: torch.Tensor,
    numbers: tuple,
) -> tuple:
    """Gradients of x, weight, bias and residual; None where none is needed."""
    activation, training, (of_x, of_weight, of_bias, of_residual), channels_last = numbers
    if not x.numel():
        found = _gradients_like(x, weight, bias, numbers[2], channels_last)
        return tuple([one.zero_() if need else None for one, need in zip(found, numbers[2], strict=True)])
    place = arrays.here(x)
    floor, array, tensor = place.floor, place.array, place.tensor
    if of_residual and residual is None:  # asked of the operation itself only
        residual = torch.zeros_like(x)
    added = None
    if residual is not None:
        residual = _as_input(residual, x)
        added = array(residual, channels_last)
    gradient = array(dy, channels_last)
    # Without a number of writes: autograd notices what is written to.
    saved = BatchNormSaved(array(x, channels_last), place.raw(statistics), channels_last, added, activation, 0)
    if not (of_x or of_residual):
        dx, (dgamma, dbeta), dresidual = None, floor.batch_norm_gradient_sums(gradient, saved), None
    elif training:
        dx, dgamma, dbeta, dresidual = floor.batch_norm_backward(gradient, saved)
    elif of_weight or of_bias:
        dx, dgamma, dbeta, dresidual = floor.batch_norm_inference_backward(gradient, saved)
    else:
        nothing, dgamma, dbeta = x.new_zeros(x.shape[1], dtype=accumulation_dtype(x.dtype)), None, None
        dx, dresidual = floor.batch_norm_input_gradient(gradient, saved, *[array(nothing)] * 2, 1)
    dweight, dbias = tensor(dgamma) if of_weight else None, tensor(dbeta) if of_bias else None
    if x.dtype.itemsize == 2:
        # Parameters may be of half types too.
        dweight, dbias = (
            one if one is None or parameter is None else one.to(parameter.dtype)
            for one, parameter in ((dweight, weight), (dbias, bias))
        )
    return (
        tensor(dx, channels_last) if of_x else None,
        dweight,
        dbias,
        tensor(dresidual, channels_last) if of_residual else None,
    )


def _run_backward(dy: torch.Tensor, x: torch.Tensor, weight: _Optional, bias: _Optional, *rest: Any) -> tuple:
    # An operation of the dispatcher has no results that are None.
    found = _found_gradients(dy, x, weight, bias, *rest)
    others = _gradients_like(x, weight, bias, [False] * 4, False)
    needed = rest[-1][2]
    return tuple(
        one if need and one is not None else other for one, need, other in zip(found, needed, others, strict=True)
    )


def _gradients_like(
    x: torch.Tensor, weight: _Optional, bias: _Optional, needed: list[bool], channels_last: bool
) -> tuple:
    """Tensors for the four gradients; empty ones for those that were not requested."""

    def of_channels(values: _Optional, need: bool) -> torch.Tensor:
        dtype = accumulation_dtype(x.dtype) if values is None else values.dtype
        return arrays.empty((x.shape[1],) if need else (0,), dtype, x)

    def of_input(need: bool) -> torch.Tensor:
        return arrays.empty(x.shape, x.dtype, x, channels_last) if need else arrays.empty((0,), x.dtype, x)

    return of_input(needed[0]), of_channels(weight, needed[1]), of_channels(bias, needed[2]), of_input(needed[3])


def _fake_backward(dy: torch.Tensor, x: torch.Tensor, weight: _Optional, bias: _Optional, *rest: Any) -> tuple:
    _, _, needed, channels_last = rest[-1]
    return _gradients_like(x, weight, bias, needed, channels_last)


def _save_backward(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-1])


def _backward_backward(ctx: Any, *gradients: Any) -> tuple:
    *inputs, statistics = ctx.saved_tensors
    activation, training, wanted, _ = ctx.numbers

    def composite(dy: Any, x: Any, weight: Any, bias: Any, residual: Any) -> tuple:
        # The statistics are arguments here, whatever they were computed from.
        found = composite_gradients(dy, x, weight, bias, residual, statistics, activation, training, None)
        return tuple(one if need else None for one, need in zip(found, wanted, strict=True))

    needed = ctx.needs_input_grad[:5]
    return *through(composite, tuple(inputs), needed, gradients), None


batch_norm_backward = define(
    f"batch_norm_backward(Tensor grad, Tensor input, {_AFFINE}, Tensor statistics, str activation, "
    "bool training, bool[] needed, bool channels_last) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    _backward_backward,
    _save_backward,
    _found_gradients,
)


def _run_update(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    num_batches_tracked: _Optional,
    statistics: torch.Tensor,
    numbers: tuple,
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``; the variance of the batch is the unbiased one.

    Without a momentum the average is cumulative: 1 over the number of batches, read on the device. As torch's own, the
    update does not count as a change for autograd's version counters. Nothing is done within a backward pass: that a
    compiled graph is recomputed, or recomputes something itself, is known only once it runs.
    """
    if is_recomputation():
        return
    count, momentum, skip_nonfinite = numbers
    batches = statistics.new_zeros((), dtype=torch.int64) if num_batches_tracked is None else num_batches_tracked
    changed = running_mean, running_var, batches
    # Half types are averaged in float32 and rounded once. The counter may be of any dtype and anywhere, as torch's.
    dtypes = statistics.dtype, statistics.dtype, _COUNTER
    wide = [one.to(statistics.device, dtype) for one, dtype in zip(changed, dtypes, strict=True)]
    place = arrays.here(statistics)
    mean, var, number = place.buffers(*wide)
    running = RunningStatistics(mean, var, number, momentum, count, finite_only=skip_nonfinite)
    place.floor.batch_norm_fold(place.array(statistics), running)
    for one, found in zip(changed, wide, strict=True):
        if found is not one:
            one.data.copy_(found)


def _fake_update(*_: Any) -> None:
    return None


update_statistics = define(
    "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor statistics, SymInt count, float? momentum, bool skip_nonfinite) -> ()",
    _run_update,
    _fake_update,
)
