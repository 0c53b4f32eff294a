"""Models of torch.nn on these kernels, in place, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, TypeVar

from torch import nn

from gpu_layers.torch.modules import COUNTERPARTS
from gpu_layers.torch.modules.batch_norm import WITH_ACTIVATION, _BatchNormAct
from gpu_layers.torch.modules.sync_batch_norm import SyncBatchNorm

_Model = TypeVar("_Model", bound=nn.Module)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def convert(model: _Model, *, fuse: bool = False, skip: Iterable[str | type[nn.Module]] = ()) -> _Model:
    """Let the modules of a model run on this package's kernels.

    Modules whose type is exactly a covered class of torch.nn become the class of the same name here, in place: the same
    objects, parameters, buffers, hooks, attributes and mode. Optimizers, checkpoints and names stay valid. Subclasses,
    SyncBatchNorm, lazy and quantized modules are left as they are.

    Parameters
    ----------
    model : torch.nn.Module
        The root is converted too.
    fuse : bool
        Also join, in every plain ``nn.Sequential``, a batch norm without hooks and the ``nn.ReLU`` that follows it into
        one ``BatchNormAct``; an ``nn.Identity`` takes the ReLU's place. A ReLU with hooks or with other users stays,
        and so does one that follows a batch norm with other users.
    skip : iterable of str and of torch.nn classes
        Names of modules (with all that is in them), and classes, to leave as they are.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        If model is not a torch.nn.Module, or if something in skip is neither name nor class.
    ValueError
        For a name in skip that the model does not have.
    """
    _check_model(model)
    names, classes = _checked_skip(skip, model)
    left = _left_alone(model, names, classes)
    for module in model.modules():
        ours = COUNTERPARTS.get(type(module))
        if ours is not None and id(module) not in left:
            module.__class__ = ours
    if fuse:
        _fuse(model, left)
    return model


def revert(model: _Model) -> _Model:
    """Undo :func:`convert`: modules become torch.nn's again, in place.

    Raises
    ------
    TypeError
        If model is not a torch.nn.Module.
    ValueError
        For a model with a ``BatchNormAct``, which has no counterpart in torch.nn; nothing is changed then.
    """
    _check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNormAct):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, which has no counterpart in torch.nn: convert "
                "without fuse=True"
            )
    theirs: dict[type, type] = {ours: one for one, ours in COUNTERPARTS.items()} | {SyncBatchNorm: nn.SyncBatchNorm}
    for module in model.modules():
        one = theirs.get(type(module))
        if one is not None:
            module.__class__ = one
            module.__dict__.pop("generator", None)
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _checked_skip(skip: Any, model: nn.Module) -> tuple[set[str], set[type]]:
    if isinstance(skip, (str, type)):
        skip = (skip,)
    names, classes = set(), set()
    for one in skip:
        if isinstance(one, str):
            names.add(one)
        elif isinstance(one, type) and issubclass(one, nn.Module):
            classes.add(one)
        else:
            raise TypeError(f"skip takes names of modules and torch.nn classes, got {one!r}")
    unknown = names - {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown:
        raise ValueError(f"the model has no module {', '.join(map(repr, sorted(unknown)))} to skip")
    return names, classes


def _left_alone(model: nn.Module, names: set[str], classes: set[type]) -> set[int]:
    """Identities of the modules to skip."""
    # What has been converted is of its class here, and may not be fused either.
    classes = classes | {COUNTERPARTS[one] for one in classes & COUNTERPARTS.keys()}
    left = {id(module) for module in model.modules() if type(module) in classes}
    for name, module in model.named_modules(remove_duplicate=False):
        if name in names:
            left |= {id(inner) for inner in module.modules()}
    return left


def _fuse(model: nn.Module, left: set[int]) -> None:
    # How often each module is used, as far as the tree of modules tells.
    users = Counter(id(child) for module in model.modules() for child in module._modules.values() if child is not None)
    users[id(model)] += 1
    for parent in list(model.modules()):
        if type(parent) is not nn.Sequential or id(parent) in left:
            continue
        children = list(parent._modules.items())
        for (_, norm), (name, relu) in pairwise(children):
            fused = WITH_ACTIVATION.get(type(norm))
            if fused is None or type(relu) is not nn.ReLU or {id(norm), id(relu)} & left:
                continue
            if users[id(norm)] > 1 or users[id(relu)] > 1 or _has_hooks(norm) or _has_hooks(relu):
                continue
            norm.__class__ = fused
            norm.activation = "relu"
            parent._modules[name] = nn.Identity().train(relu.training)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, hooks, None) for hooks in _HOOKS)
