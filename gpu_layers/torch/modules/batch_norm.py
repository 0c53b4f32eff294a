"""Batch norm modules: torch's, and with an activation and a residual in the same kernel."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from gpu_layers.torch.checks import check_tensor, checked_activation
from gpu_layers.torch.functional.batch_norm import normalize
from gpu_layers.torch.leaf import call_of

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d"]


def _normalize(module: Any, input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """What ``forward`` does, of a module with the attributes of ``torch.nn.BatchNorm2d``."""
    if not isinstance(input, Tensor):
        return call_of(module, input, *([] if residual is None else [residual]))
    check_tensor(input)
    module._check_input_dim(input)
    mean, var, tracked, training = statistics_of(module)
    held = module._parameters
    try:
        weight, bias = held["weight"], held["bias"]
    except KeyError:  # no parameters, but computed from such
        weight, bias = module.weight, module.bias
    return normalize(
        input,
        mean,
        var,
        tracked,
        weight,
        bias,
        training,
        module.momentum,
        module.eps,
        residual,
        activation,
        module.skip_nonfinite,
    )


def statistics_of(module: Any) -> tuple[Any, Any, Any, bool]:
    """Running mean and variance and the number of batches, as far as they are used, and whether the batch's are."""
    held = module._buffers  # at once; a module's attributes are looked for in four places
    try:
        mean, var, tracked = held["running_mean"], held["running_var"], held["num_batches_tracked"]
    except KeyError:
        mean, var, tracked = module.running_mean, module.running_var, module.num_batches_tracked
    if not module.training:
        return mean, var, None, mean is None and var is None
    if module.track_running_stats:
        return mean, var, tracked, True
    return None, None, None, True


class _BatchNorm(nn.Module):
    """What torch's three classes get.

    Attributes
    ----------
    skip_nonfinite : bool
        Leave the running statistics as they are, and do not count the batch, where it holds NaN or infinity: a step
        that a gradient scaler skips does not poison them. False at first.
    """

    skip_nonfinite = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "activation" in kwargs:
            name = type(self).__name__
            raise TypeError(f"{name} takes no activation: use {name.replace('BatchNorm', 'BatchNormAct')}")
        super().__init__(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the statistics of the batch in training, with the running ones in evaluation."""
        return _normalize(self, input, None, None)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``, whose running statistics a recomputed batch updates once."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, whose running statistics a recomputed batch updates once."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``, whose running statistics a recomputed batch updates once."""


for _ours in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
    _ours.__signature__ = inspect.signature(getattr(nn, _ours.__name__))


class _BatchNormAct(nn.Module):
    """Batch norm, an addition and an activation in one kernel each way: ``phi(bn(input) + residual)``.

    Deliberately no subclass of torch's batch norms: converters that rebuild those would drop the activation.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype, bias
        As of ``torch.nn.BatchNorm2d``.
    activation : {"relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "identity"} or None
        phi; leaky_relu has a slope of 0.01, gelu is the exact one, None is the identity.

    Raises
    ------
    ValueError
        For an unknown activation.
    """

    _version = 2
    _ranks: tuple[int, ...]
    skip_nonfinite = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = "relu",
    ) -> None:
        super().__init__()
        checked_activation(activation)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.activation = activation

        def parameter(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if wanted else None

        def buffer(make: Any) -> Tensor | None:
            return make(num_features, device=device, dtype=dtype) if track_running_stats else None

        self.register_parameter("weight", parameter(affine))
        self.register_parameter("bias", parameter(affine and bias))
        self.register_buffer("running_mean", buffer(torch.zeros))
        self.register_buffer("running_var", buffer(torch.ones))
        counter = torch.tensor(0, dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", counter)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, no batch."""
        if self.track_running_stats:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Running statistics as at first; weight 1, bias 0."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``phi(bn(input) + residual)``.

        Parameters
        ----------
        input : Tensor, shape (N, C, *spatial)
        residual : Tensor, optional
            Of the input's shape (ValueError) and dtype (TypeError).
        """
        return _normalize(self, input, residual, self.activation)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._ranks:
            expected = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"expected {expected} input (got {input.dim()}D input)")

    def extra_repr(self) -> str:
        """As torch's, and the activation."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}, "
            f"activation={self.activation!r}"
        )

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *collected: Any
    ) -> None:
        version = local_metadata.get("version", None)
        # As torch's batch norms: before version 2 batches were not counted.
        if (version is None or version < 2) and self.track_running_stats:
            key = prefix + "num_batches_tracked"
            if key not in state_dict:
                own = self.num_batches_tracked
                known = own is not None and not own.is_meta
                state_dict[key] = own if known else torch.tensor(0, dtype=torch.long)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *collected)


class BatchNormAct1d(_BatchNormAct):
    __doc__ = _BatchNormAct.__doc__
    _ranks = (2, 3)


class BatchNormAct2d(_BatchNormAct):
    __doc__ = _BatchNormAct.__doc__
    _ranks = (4,)


class BatchNormAct3d(_BatchNormAct):
    __doc__ = _BatchNormAct.__doc__
    _ranks = (5,)


#: The class that takes the place of a torch.nn class.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
#: The class of a batch norm that absorbed the activation that follows it.
WITH_ACTIVATION: dict[type[nn.Module], type[nn.Module]] = {
    BatchNorm1d: BatchNormAct1d,
    BatchNorm2d: BatchNormAct2d,
    BatchNorm3d: BatchNormAct3d,
}
