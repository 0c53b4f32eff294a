"""Converting the batch norms of a model to SyncBatchNorm and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from gpu_layers.distributed.communicator import Communicator, default_communicator
from gpu_layers.layers.base import Layer
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormLayer
from gpu_layers.layers.batch_norm_max_pool import BatchNormMaxPool
from gpu_layers.layers.layer_tree import layers_of
from gpu_layers.layers.sync_batch_norm import SyncBatchNorm
from gpu_layers.models.plain_layers import replaced_methods
from gpu_layers.ops.sync_batch_norm import check_communicator

_Model = TypeVar("_Model", bound=Callable[..., object])

_CONVERTED = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


def convert_sync_batch_norm(
    model: _Model, communicator: Communicator | None = None, *, layers: Iterable[Layer] | None = None
) -> _Model:
    """Make every batch norm of a model use the statistics of all processes, as :class:`SyncBatchNorm` does.

    It works in place: the layers stay the same objects, with their parameters, buffers, switches and modes, and
    references to them, such as an optimizer's, stay valid. Ghost batch norms, which use fewer samples on purpose, do
    not change.

    Parameters
    ----------
    model : Layer or callable
        Layers are found in its attributes, at any depth.
    communicator : gpu_layers.distributed.Communicator, optional
        As in :class:`SyncBatchNorm`.
    layers : iterable of Layer, optional
        The layers to use, if the model is a function: it does not show which layers it calls.

    Returns
    -------
    Layer or callable
        The model.

    Raises
    ------
    TypeError
        For a batch norm of a subclass, one with a replaced method, or one that is fused with a max pooling (convert
        first, then fuse). Nothing is converted then.
    ValueError
        For a model that is not a function and holds no layer.
    RuntimeError
        If ``mpirun`` started several processes and mpi4py is missing.
    """
    if communicator is not None:
        check_communicator(communicator)
    found = [layer for layer in layers_of(model, layers) if isinstance(layer, BatchNormLayer)]
    for layer in found:
        name, replaced = type(layer).__name__, replaced_methods(layer)
        if isinstance(layer, BatchNormMaxPool):
            raise TypeError("a batch norm that is fused with a max pooling is not converted: convert first, then fuse")
        if not type(layer)._of_this_library:
            raise TypeError(f"{name} is a subclass, whose forward may be another: not converted")
        if type(layer) in _CONVERTED and replaced:
            raise TypeError(f"the {name}'s {', '.join(replaced)} was replaced: not converted")
    engine = default_communicator() if communicator is None else communicator
    for layer in found:
        if type(layer) in _CONVERTED:
            vars(layer).update(_before_conversion=type(layer), communicator=engine, _saved=None)
            layer.__class__ = SyncBatchNorm
    return model


def revert_sync_batch_norm(
    model: _Model, kind: type[BatchNormLayer] | None = None, *, layers: Iterable[Layer] | None = None
) -> _Model:
    """Undo :func:`convert_sync_batch_norm`, for evaluation or to continue in one process.

    Parameters
    ----------
    model, layers
        As in :func:`convert_sync_batch_norm`.
    kind : {BatchNorm1d, BatchNorm2d, BatchNorm3d}, optional
        The class for layers that were made as a SyncBatchNorm.

    Returns
    -------
    Layer or callable
        The model.

    Raises
    ------
    TypeError
        For another kind.
    ValueError
        For a layer that was made as a SyncBatchNorm, without a kind. Nothing is converted then.
    """
    if kind is not None and kind not in _CONVERTED:
        raise TypeError(f"kind must be one of {', '.join(one.__name__ for one in _CONVERTED)}, got {kind}")
    found = [layer for layer in layers_of(model, layers) if type(layer) is SyncBatchNorm]
    for layer in found:
        if kind is None and "_before_conversion" not in vars(layer):
            raise ValueError(f"{layer!r} was made as a SyncBatchNorm: say by kind= what it becomes")
    for layer in found:
        own = vars(layer)
        before = own.pop("_before_conversion", kind)
        del own["communicator"]
        own["_saved"] = None
        layer.__class__ = before
    return model
