"""Estimating the running statistics of batch norm over a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gpu_layers.core.array import Array
from gpu_layers.core.checks import check_choice
from gpu_layers.core.cuda import array_module, place_of
from gpu_layers.core.moments import Moments, merged
from gpu_layers.core.valid import ValidPositions
from gpu_layers.layers.base import Layer
from gpu_layers.layers.batch_norm import BatchNormLayer
from gpu_layers.layers.layer_tree import layers_of, modes
from gpu_layers.layers.running_statistics import BatchStatistics
from gpu_layers.models.snapshot import Snapshot
from gpu_layers.runtime.copying import overwrite, own_copy

_ORDERS = ("sequential", "joint")
_NOTHING = object()


def recalibrate(
    model: Callable[..., object],
    batches: Iterable[object] | Callable[[], Iterable[object]],
    *,
    order: str = "sequential",
    layers: Iterable[Layer] | None = None,
) -> None:
    """Replace every batch norm's running statistics by the exact mean and unbiased variance over a data set.

    Moving averages contain batches of older weights, and inputs to which dropout was applied: in evaluation, a
    batch norm after dropout sees a smaller variance than the one it divides by (the variance shift of Li, Chen, Hu and
    Yang, CVPR 2019). So dropout and all other layers that are not batch norms are in evaluation mode here.

    ``order="sequential"`` estimates one batch norm after the other, in the order in which the model calls them. All
    others evaluate; those before it already have their new statistics. Afterwards each has exactly the statistics of
    what it receives in evaluation, which repairs a shift. That takes one pass over the data to learn which batch calls
    which batch norm how often, and one for each batch norm, which ends at that layer if every batch calls it equally
    often. ``order="joint"`` is PreciseBN (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021): one pass in which
    every batch norm normalises by the batch, and the statistics of all batches are pooled. It is cheaper. Deeper layers
    are then estimated on inputs that differ from those in evaluation, the more so the smaller the batches are.

    Batches are merged by their counts in float64 (Chan), so it does not matter how the data is split into batches (in
    the order "joint": for the first batch norm). ``num_batches_tracked`` becomes the number of batches. Parameters and
    modes do not change, nor does a batch norm that no batch reaches. What a forward saved for backward is dropped. If
    anything fails, nothing has changed.

    Parameters
    ----------
    model : Layer or callable
        Layers are found in its attributes, at any depth.
    batches : iterable, or function that returns one
        Each batch is the model's input, or a tuple or list that begins with it. The order "sequential" goes through the
        batches several times: pass a list or a function, not a generator.
    order : {"sequential", "joint"}
    layers : iterable of Layer, optional
        The layers to use, if the model is a function: it does not show which layers it calls.

    Raises
    ------
    TypeError
        For a model that cannot be called, or batches that cannot be iterated (several times, if needed).
    ValueError
        For an unknown order, a model without running statistics, no batches, a batch norm that receives fewer than two
        values per channel, or statistics that are not finite; also whatever the model raises.
    """
    if not callable(model):
        raise TypeError(f"model must be a layer or a function, got {type(model).__name__}")
    check_choice(order, "order", _ORDERS)
    found = layers_of(model, layers)
    tracking = [layer for layer in found if isinstance(layer, BatchNormLayer) and layer.track_running_stats]
    if not tracking:
        raise ValueError("found no batch norm with running statistics in the model: name its layers with layers=")
    run = _Run(model, batches, any(getattr(layer, "inplace", False) for layer in found))
    with _all_or_nothing(found), modes(found, training=lambda layer: False):
        if order == "joint":
            _estimate_jointly(run, tracking)
        else:
            _estimate_in_order(run, tracking)


class _Run:
    """Runs of the model over the batches."""

    def __init__(self, model: Callable[..., object], batches: Array, copies: bool) -> None:
        if not callable(batches) and not hasattr(batches, "__iter__"):
            raise TypeError(
                f"batches must be an iterable, or a function that returns one, got {type(batches).__name__}"
            )
        self._model, self._batches, self._copies = model, batches, copies

    @property
    def repeats(self) -> bool:
        """Whether the batches can be gone through again."""
        return callable(self._batches) or iter(self._batches) is not self._batches

    def batches(self) -> Iterator[Any]:
        """All of them, again."""
        for batch in self._batches() if callable(self._batches) else self._batches:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            # A layer that works in place would change the caller's data.
            yield own_copy(x) if self._copies else x

    def __call__(self, x: Array) -> None:
        self._model(x)


class _Pool:
    """The values that a batch norm has received so far."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.calls = self.calls_in_batch = 0

    def add(self, part: Moments) -> None:
        self.moments = merged([part] if self.moments is None else [self.moments, part])
        self.calls += 1
        self.calls_in_batch += 1

    def add_batch(self, batch: BatchStatistics) -> None:
        self.add(Moments.of(int(batch.count), batch.mean, batch.var))


def _estimate_jointly(run: _Run, layers: list[BatchNormLayer]) -> None:
    pools = [_Pool() for _ in layers]
    number = 0
    with ExitStack() as stack, modes(layers, training=lambda layer: True):
        for layer, pool in zip(layers, pools, strict=True):
            stack.enter_context(_attribute(layer, "_take_batch", pool.add_batch))
            stack.enter_context(_following_the_mode(layer))
        for number, x in enumerate(run.batches(), 1):  # noqa: B007
            run(x)
    for layer, pool in zip(layers, pools, strict=True):
        if pool.calls:
            _take_over(layer, pool, number)
    _check_any(pools)


class _Enough(BaseException):
    """The rest of a forward is not needed. It is not an Exception, so that no model catches it."""


def _estimate_in_order(run: _Run, layers: list[BatchNormLayer]) -> None:
    pools = []
    with ExitStack() as stack:
        for layer in layers:
            # In evaluation no layer may change its statistics, whatever its switch says.
            stack.enter_context(_attribute(layer, "_update_statistics", None))
        for layer, calls in _calls_in_order(run, layers):
            pool = _Pool()
            pools.append(pool)
            number = 0
            with _attribute(layer, "_forward", _observing(layer, pool, calls)):
                for number, x in enumerate(run.batches(), 1):  # noqa: B007
                    pool.calls_in_batch = 0
                    try:
                        run(x)
                    except _Enough:
                        continue
            _take_over(layer, pool, number)
    _check_any(pools)


def _check_any(pools: list[_Pool]) -> None:
    if not any(pool.calls for pool in pools):
        raise ValueError("no batch reached a batch norm with running statistics")


def _observing(layer: BatchNormLayer, pool: _Pool, calls: int | None) -> Callable[..., Any]:
    """The layer's inner forward, which also pools the moments of its input.

    It ends the model's forward after so many calls, if the number is known. It works below ``forward``, which may have
    been replaced.
    """
    forward = layer._forward

    def observed(x: Array, residual: Array, valid: ValidPositions | None) -> Any:
        pool.add(layer._moments(x, valid))
        if pool.calls_in_batch == calls:
            raise _Enough
        return forward(x, residual, valid)

    return observed


def _calls_in_order(run: _Run, layers: list[BatchNormLayer]) -> list[tuple[BatchNormLayer, int | None]]:
    """The layers in the order of their calls, and the number of calls in a batch, if it is always the same."""
    if not run.repeats:
        if len(layers) == 1:
            # Counting calls would use up the batches. Without a number of calls a forward runs to its end.
            return [(layers[0], None)]
        raise TypeError(
            "order='sequential' goes through the batches again for each batch norm, got an iterator: pass a list, or a "
            "function that returns an iterator, or order='joint'"
        )
    called: Counter[int] = Counter()
    sequences: dict[tuple[int, ...], None] = {}
    counts: dict[int, set[int]] = {}
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_attribute(layer, "_forward", _counting(layer, index, called)))
        for x in run.batches():
            called.clear()
            run(x)
            sequences[tuple(called)] = None
            for index, calls in called.items():
                counts.setdefault(index, set()).add(calls)
    return [(layers[index], min(counts[index]) if len(counts[index]) == 1 else None) for index in _merged(sequences)]


def _counting(layer: BatchNormLayer, index: int, called: Counter[int]) -> Callable[..., Any]:
    forward = layer._forward

    def counted(*args: Any) -> Any:
        called[index] += 1
        return forward(*args)

    return counted


def _merged(sequences: Iterable[tuple[int, ...]]) -> list[int]:
    """One order for all: each after those that come before it anywhere; if these contradict, the first seen first."""
    before: dict[int, set[int]] = {}
    for sequence in sequences:
        for place, one in enumerate(sequence):
            before.setdefault(one, set()).update(sequence[max(place - 1, 0) : place])
    order: list[int] = []
    while len(order) < len(before):
        waiting = [one for one in before if one not in order]
        order.append(next((one for one in waiting if before[one].isdisjoint(waiting)), waiting[0]))
    return order


def _take_over(layer: BatchNormLayer, pool: _Pool, batches: int) -> None:
    moments = pool.moments
    count = 0 if moments is None else moments.count
    if moments is None or count < 2:
        raise ValueError(f"a variance needs at least 2 values per channel, {layer!r} got {count} in {batches} batches")
    var = moments.unbiased_var
    with place_of(var):
        if not bool(array_module(var).isfinite(moments.mean + var).all()):
            raise ValueError(
                f"the statistics of {layer!r} are not finite: the data, or what the model makes of it, is not"
            )
        overwrite(layer.buffers["running_mean"], moments.mean.astype(layer.dtype))
        overwrite(layer.buffers["running_var"], var.astype(layer.dtype))
        layer.buffers["num_batches_tracked"][...] = batches


@contextmanager
def _attribute(layer: BatchNormLayer, name: str, value: object) -> Iterator[None]:
    """An attribute of this one layer replaced for a while; what the layer had of its own comes back."""
    had = vars(layer).get(name, _NOTHING)
    setattr(layer, name, value)
    try:
        yield
    finally:
        if had is _NOTHING:
            delattr(layer, name)
        else:
            setattr(layer, name, had)


@contextmanager
def _following_the_mode(layer: BatchNormLayer) -> Iterator[None]:
    """The layer's switches off for a while."""
    before = layer.use_batch_statistics, layer.update_statistics
    layer.use_batch_statistics = layer.update_statistics = None
    try:
        yield
    finally:
        layer.use_batch_statistics, layer.update_statistics = before


@contextmanager
def _all_or_nothing(layers: list[Layer]) -> Iterator[None]:
    """Buffers, and what was saved for backward, as they were if anything fails; nothing saved if all is well."""
    before, saved = Snapshot(layers), [layer.last_call for layer in layers]
    try:
        yield
    except BaseException:
        before.restore()
        for layer, own in zip(layers, saved, strict=True):
            layer.last_call = own
        raise
    for layer in layers:
        layer.last_call = None
