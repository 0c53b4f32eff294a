"""Batch norm with the statistics of the batches of several processes, through ``torch.distributed``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad

from gpu_layers.core.batch_norm_saved import BatchNormSaved
from gpu_layers.torch import arrays, random, registry
from gpu_layers.torch.checks import check_tensor
from gpu_layers.torch.functional.batch_norm import check_batch_norm, normalize
from gpu_layers.torch.leaf import call_of
from gpu_layers.torch.modules.batch_norm import _BatchNormAct, statistics_of
from gpu_layers.torch.ops.batch_norm import composite_gradients

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm``, on CPU tensors too: y, dx and running statistics are those of one process with all.

    The processes of the group hold parts of a batch, of any sizes, also empty ones. Each direction gathers some numbers
    of every channel, which are added in the order of the ranks in float64: the same bits everywhere, and in every run.
    Gradients of weight and bias are sums over the process's part, as in torch. Second derivatives exchange as well, and
    all processes have to ask for them. ``convert`` keeps torch's class;
    :meth:`convert_sync_batchnorm` makes this one of all batch norms. Not in compiled graphs, nor under ``torch.func``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the statistics of all processes in training, with the running ones in evaluation."""
        if not isinstance(input, Tensor):
            return call_of(self, input)
        check_tensor(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        mean, var, tracked, training = statistics_of(self)
        group = self.process_group or distributed.group.WORLD if distributed.is_initialized() else None
        alone = group is None or distributed.get_world_size(group) == 1
        given = mean, var, tracked, self.weight, self.bias, training, self.momentum, self.eps
        if not training or alone:
            return normalize(input, *given, None, None, False)
        # Of one value per channel the other processes may have more.
        eager = registry.is_eager(input, self.weight, self.bias)
        check_batch_norm(
            input, mean, var, self.weight, self.bias, False, self.momentum, self.eps, eager, given_later=True
        )
        if not eager:
            raise RuntimeError("gpu_layers.torch.SyncBatchNorm runs eagerly only, not in graphs or under torch.func")
        y, statistics, count = _Synchronized.apply(
            input, self.weight, self.bias, self.eps, arrays.is_channels_last(input.shape, input.stride()), group
        )
        if mean is not None and not random.is_recomputation():
            _update(mean, var, tracked, statistics, count, self.momentum)
        return y

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """As torch's, to this class; a ``BatchNormAct``, which has no counterpart, stays and is named in a warning."""
        for name, one in module.named_modules():
            if isinstance(one, _BatchNormAct):
                warnings.warn(
                    f"{name or 'the model'} is a {type(one).__name__}, which is not synchronised: convert the model "
                    "without fuse=True",
                    stacklevel=2,
                )
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for one in module.modules():
            if type(one) is nn.SyncBatchNorm:
                one.__class__ = cls
        return module


@torch.no_grad()
def _update(mean: Tensor, var: Tensor, tracked: Any, statistics: Tensor, count: Tensor, momentum: float | None) -> None:
    """As one process with all of the batch; count is read where it lies."""
    newest: Any = 0.0 if momentum is None else momentum  # without a counter, as torch
    if tracked is not None:
        tracked.add_(1)
        if momentum is None:
            newest = tracked.double().reciprocal()
    unbiased = statistics[1] * (count / (count - 1).clamp(min=1))
    for running, batch in ((mean, statistics[0]), (var, unbiased)):
        running.copy_(running * (1 - newest) + batch * newest)


def _gathered(values: Tensor, group: Any) -> Tensor:
    """Of every process, in the order of the ranks."""
    parts = [torch.empty_like(values) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, values, group=group)
    return torch.stack(parts)


class _Total(torch.autograd.Function):
    """The sum over all processes, which each of them gets; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        """Exchange, and add in the order of the ranks."""
        ctx.group = group
        return _gathered(values.double(), group).sum(0).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple:
        """All processes have to get here."""
        return _Total.apply(dy, ctx.group), None


class _Synchronized(torch.autograd.Function):
    """Gives the result, the statistics (5, C) and the number of values per channel in all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float, channels_last: bool, group: Any) -> tuple:
        """Two passes over x, the exchange between them."""
        dtype, place, channels = arrays.accumulation_dtype(x.dtype), arrays.here(x), x.shape[1]
        own = x.numel() // channels
        mean, square = (torch.zeros(channels, dtype=torch.float64, device=x.device) for _ in range(2))
        if own:
            found = place.floor.batch_norm_statistics(place.array(x, channels_last), None, None, eps, channels_last)
            mean, square = place.tensor(found)[:2].double()
            square = square * own
        told = _gathered(torch.cat([torch.full_like(mean[:1], own), mean, square]), group)
        counts, means, squares = told[:, :1], told[:, 1 : 1 + channels], told[:, 1 + channels :]
        count = counts.sum(0)
        mean = (counts * means).sum(0) / count.clamp(min=1)
        # Chan, Golub and LeVeque (1979).
        var = (squares + counts * (means - mean).square()).sum(0) / count.clamp(min=1)
        y, statistics = place.floor.batch_norm_inference(
            place.array(x, channels_last),
            *place.parameters(mean, var, dtype),
            *place.parameters(weight, bias, dtype),
            eps,
            channels_last,
        )
        statistics = place.tensor(statistics)
        ctx.save_for_backward(x, weight, bias, statistics, count)
        ctx.mark_non_differentiable(statistics, count)
        ctx.set_materialize_grads(False)
        ctx.place, ctx.channels_last, ctx.group, ctx.eps = arrays.place(), channels_last, group, eps
        return place.tensor(y, channels_last), statistics, count

    @staticmethod
    def backward(ctx: Any, dy: Any, *_: Any) -> tuple:
        """Two passes over x and dy, the exchange between them; all processes have to get here."""
        x, weight, bias, statistics, count = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        dy = torch.zeros_like(x) if dy is None else dy
        if forward_ad._current_level >= 0:
            registry.refuse_tangents("sync_batch_norm_backward", (dy,))
        if torch.is_grad_enabled():
            # Of operations that have gradients themselves, in which all processes have to take part too.
            found = composite_gradients(
                *(dy, x, weight, bias, None, statistics, "identity", True, ctx.eps),
                lambda sums: _Total.apply(sums, ctx.group) / count.to(sums.dtype),
            )
            needed = (of_x, of_weight, of_bias)
            return *(one if need else None for one, need in zip(found, needed, strict=False)), None, None, None
        with arrays.at(ctx.place):
            place, last = arrays.here(x), ctx.channels_last
            gradient = place.array(dy, last)
            saved = BatchNormSaved(place.array(x, last), place.array(statistics), last)
            if x.numel():
                sums = [place.tensor(one) for one in place.floor.batch_norm_gradient_sums(gradient, saved)]
            else:
                sums = list(torch.zeros_like(statistics[:2]))
            # Of all processes, even where the own part needs no gradient: others may.
            means = (_gathered(torch.stack(sums).double(), ctx.group).sum(0) / count).to(statistics.dtype)
            dx = None
            if of_x:
                dx = torch.empty_like(x)
                if x.numel():
                    found, _ = place.floor.batch_norm_input_gradient(gradient, saved, *map(place.array, means), 1)
                    dx = place.tensor(found, last)
        dweight, dbias = (
            one.to(parameter.dtype) if need else None
            for one, parameter, need in zip(sums, (weight, bias), (of_weight, of_bias), strict=True)
        )
        return dx, dweight, dbias, None, None, None
