"""Batch norm folded into the layers before it, for evaluation."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_layers.torch.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNormAct

_Model = TypeVar("_Model", bound=nn.Module)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
# Axis of the output channels in the weight.
_CHANNEL_AXIS = {
    nn.Linear: 0,
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
}
_ACTIVATIONS: dict[str | None, Any] = {
    None: nn.Identity,
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def fold_batch_norm(model: _Model, sample: Any = None) -> _Model:
    """A copy of a model for evaluation, whose batch norms are folded into the layers in front of them.

    With ``s = gamma / sqrt(running_var + eps)`` a weight becomes ``s * weight`` and a bias
    ``(bias - running_mean) * s + beta`` (Jacob et al., CVPR 2018, section 3.2), computed in float64 and rounded once.
    What is folded: a batch norm (of torch or of this package, with running statistics) directly after a Linear,
    Conv1d-3d or ConvTranspose1d-3d, grouped or not, with a bias or without, where both are used once and nowhere
    else. Pairs are found by ``torch.fx``. Where a model cannot be traced they are those that its run of the sample
    shows, so that other inputs have to take the same way through it; and without a sample those in every plain
    ``nn.Sequential``. An ``nn.Identity`` takes a batch norm's place, and of a ``BatchNormAct`` without a residual its
    activation.

    Parameters
    ----------
    model : torch.nn.Module
        Stays as it is.
    sample : tensor, or tuple of arguments, optional
        An input for which the results of both models are compared.

    Returns
    -------
    torch.nn.Module
        In evaluation mode; its parameters are copies.

    Raises
    ------
    TypeError
        If model is not a torch.nn.Module.
    ValueError
        If the results on the sample differ by more than rounding: each layer's by a few roundings of its sums.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    folded = copy.deepcopy(model).eval()
    if sample is not None and not isinstance(sample, tuple):
        sample = (sample,)
    depth = 0
    for layer, norm, owners in _pairs(folded, sample):
        _fold(layer, norm)
        depth += 1
        for parent, name in owners:
            parent._modules[name] = _what_is_left(norm)
    if sample is not None:
        _check(model, folded, sample, depth)
    return folded


def _pairs(model: nn.Module, sample: tuple | None) -> list[tuple[nn.Module, nn.Module, list]]:
    """Layers with the batch norms that directly follow them, and where those are held."""
    owners: dict[int, list] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                owners.setdefault(id(child), []).append((parent, name))
    return [
        (layer, norm, owners[id(norm)])
        for layer, norm in _neighbours(model, sample)
        if _can_fold(layer, norm) and len(owners.get(id(layer), ())) == 1 and len(owners.get(id(norm), ())) == 1
    ]


def _neighbours(model: nn.Module, sample: tuple | None) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules and the only modules that their results go to."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # control flow that depends on values, or whatever else cannot be traced
        if sample is not None:
            yield from _observed(model, sample)
            return
        for parent in model.modules():
            if type(parent) is nn.Sequential:
                children = list(parent)
                yield from pairwise(children)
        return
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    reads = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        before = node.args[0]
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        if calls[node.target] == calls[before.target] == 1 and not {node.target, before.target} & reads:
            yield modules[before.target], modules[node.target]


class _Reads(TorchDispatchMode):
    """How many operations have read each tensor, by its identity: of tensors that live on."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.alias.default:  # by which operations of this package look for tangents
            self.of.update(id(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor))
        return func(*args, **kwargs)


def _observed(model: nn.Module, sample: tuple) -> Iterator[tuple[nn.Module, nn.Module]]:
    """As :func:`_neighbours`, in a run of the sample."""
    reads, calls, found = _Reads(), Counter[nn.Module](), []
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # by layers, whose results live as long

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls[module] += 1
        if len(args) == 1 and not kwargs and id(args[0]) in made:
            found.append((*made[id(args[0])], module))
        if type(module) in _CHANNEL_AXIS:
            made[id(output)] = module, output
            reads.of[id(output)] = 0

    noted = [one for one in model.modules() if type(one) in _CHANNEL_AXIS or _is_norm(one)]
    handles = [one.register_forward_hook(note, with_kwargs=True) for one in noted]
    with torch.no_grad(), reads:
        model(*sample)
    for handle in handles:
        handle.remove()
    for layer, output, norm in found:
        own = [*layer.parameters(), *norm.parameters(), *norm.buffers()]
        if calls[layer] == calls[norm] == reads.of[id(output)] == 1 and all(reads.of[id(one)] <= 1 for one in own):
            yield layer, norm


def _is_norm(module: nn.Module) -> bool:
    return type(module) in _NORMS or isinstance(module, _BatchNormAct)


def _can_fold(layer: nn.Module, norm: nn.Module) -> bool:
    if type(layer) not in _CHANNEL_AXIS or not _is_norm(norm):
        return False
    if norm.running_mean is None or norm.running_var is None:
        return False
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if channels != norm.num_features:
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return not any(getattr(one, kind) for one in (layer, norm) for kind in hooks)


def _fold(layer: Any, norm: Any) -> None:
    weight = layer.weight.detach()
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double()
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    layer.weight = nn.Parameter(_scaled(weight.double(), scale, layer).to(weight.dtype), layer.weight.requires_grad)
    layer.bias = nn.Parameter(shift.to(weight.dtype), layer.weight.requires_grad)


def _scaled(weight: Tensor, scale: Tensor, layer: Any) -> Tensor:
    """The weight, each output channel's part times its factor."""
    if _CHANNEL_AXIS[type(layer)] == 0:
        return weight * scale.reshape(-1, *(1,) * (weight.dim() - 1))
    # (in, out / groups, ...): the inputs of a group go to the outputs of that group.
    groups = layer.groups
    parts = weight.reshape(groups, -1, *weight.shape[1:])
    factor = scale.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))
    return (parts * factor).reshape(weight.shape)


def _what_is_left(norm: nn.Module) -> nn.Module:
    activation = norm.activation if isinstance(norm, _BatchNormAct) else None
    return _ACTIVATIONS[activation]().eval()


def _check(model: nn.Module, folded: nn.Module, sample: tuple, depth: int) -> None:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            expected, actual = _flat(model(*sample)), _flat(folded(*sample))
    finally:
        for module, mode in modes.items():
            module.training = mode
    for one, other in zip(expected, actual, strict=True):
        # A pair's two results differ by some roundings of a sum of thousands of products: 64 of them relative to the
        # largest value, for each pair that an input passes.
        unit = torch.finfo(one.dtype).eps
        bound = 64 * unit * max(depth, 1) * float(one.abs().max()) if one.numel() else 0.0
        error = float((one - other).abs().max()) if one.numel() else 0.0
        if not error <= bound:
            raise ValueError(
                f"the folded model's result differs by {error:.3g} on the sample, more than the {bound:.3g} that "
                "rounding explains"
            )


def _flat(result: Any) -> list[Tensor]:
    return [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.is_floating_point()]
