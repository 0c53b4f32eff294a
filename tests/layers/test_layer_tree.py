"""Layers in models that are no layers: found wherever they can be, and said where none is."""

import functools
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.layers.layer_tree import layers_of
from tests.inputs import assert_same_bits, normal


class Slots:
    __slots__ = ("__private", "drop", "nothing")

    def __init__(self, drop, norm):
        self.drop, self.__private = drop, norm

    def __call__(self, x):
        return self.drop(self.__private(x))


class MoreSlots(Slots):
    __slots__ = ("third",)


@dataclass
class Data:
    drop: gl.Layer
    rest: dict = field(default_factory=dict)

    def __call__(self, x):
        return self.drop(self.rest["norm"](x))


class Plain:
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, x):
        return self.run(x)

    def method(self, x, scale=1):
        return self(x)


class OfTheClass:
    parts = (gl.ReLU(),)


def run(x, *, drop, norm):
    return drop(norm(x))


def apply(parts, x):
    return parts["drop"](parts["norm"](x))


MODELS = {
    "two deep": lambda d, n: Plain(run=Plain(run=lambda x: d(n(x)), inner=Plain(drop=d, norm=n)).__call__),
    "set": lambda d, n: Plain(run=lambda x: d(n(x)), parts={d, n}),
    "frozenset": lambda d, n: Plain(run=lambda x: d(n(x)), parts=frozenset([d, n])),
    "deque": lambda d, n: Plain(run=lambda x: d(n(x)), parts=deque([(d,), [n]])),
    "keys": lambda d, n: Plain(run=lambda x: d(n(x)), parts=OrderedDict({d: 1, n: 2})),
    "namespace": lambda d, n: Plain(run=lambda x: d(n(x)), parts=SimpleNamespace(d=SimpleNamespace(d=d), n=n)),
    "slots": Slots,
    "inherited slots": MoreSlots,
    "data class": lambda d, n: Data(d, {"norm": n}),
    "method": lambda d, n: Plain(run=lambda x: d(n(x)), parts=[d, n]).method,
    "partial of a method": lambda d, n: functools.partial(Plain(run=lambda x: d(n(x)), parts=[d, n]).method, scale=2),
    "partial of a function": lambda d, n: functools.partial(run, drop=d, norm=n),
    "partial of a partial": lambda d, n: functools.partial(functools.partial(apply, {"drop": d, "norm": n})),
    "partial of a layer": lambda d, n: functools.partial(gl.Sequential(n, d)),
    "object in a layer": lambda d, n: _layer_with(Plain(run=lambda x: d(n(x)), parts=[d, n])),
}


def _layer_with(foreign):
    class Wraps(gl.Layer):
        def __init__(self):
            super().__init__()
            self.foreign = foreign

        def forward(self, x):
            return self.foreign(x)

    return Wraps()


each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def parts():
    return gl.Dropout(0.5, generator=gl.Generator(3)), gl.BatchNorm1d(4)


@each_model
def test_layers_are_found(make):
    dropout, norm = parts()
    found = layers_of(make(dropout, norm))
    assert {dropout, norm} <= set(found)
    assert len(found) == len(set(found))


@each_model
def test_mc_dropout_drops_and_leaves_statistics(make):
    dropout, norm = parts()
    model = make(dropout.eval(), norm)
    _, variance = gl.mc_dropout(model, normal((50, 4), np.float32), passes=8)
    assert variance.max() > 0
    assert norm.buffers["num_batches_tracked"] == 0
    assert (dropout.training, norm.training) == (False, True)


@each_model
def test_statistics_wait_and_are_estimated(make):
    dropout, norm = parts()
    model, x = make(dropout, norm), normal((50, 4), np.float32)
    with pytest.raises(TypeError), gl.statistics_transaction(model):
        model(model(x).astype(int))
    assert norm.buffers["num_batches_tracked"] == 0
    gl.recalibrate(model, [x])
    # 50 values: the sum of 50 roundings of 6e-8, of values below 3.
    np.testing.assert_allclose(norm.buffers["running_mean"], x.mean(axis=0), rtol=0, atol=1e-5)


def test_layers_of_a_class_and_what_is_not_looked_into():
    assert [type(layer) for layer in layers_of(OfTheClass())] == [gl.ReLU]
    deep = Plain(drop=gl.Dropout())
    for _ in range(5000):
        deep = Plain(inner=deep, back=None)
        deep.inner.back = deep
    assert len(layers_of(deep)) == 1


def test_where_none_is_found_it_is_said():
    x = normal((5, 4), np.float32)
    for model in (Plain(run=lambda x: x), Plain(run=lambda x: x).method):
        for use in (
            lambda: gl.mc_dropout(model, x),  # noqa: B023
            lambda: gl.recalibrate(model, [x]),  # noqa: B023
            lambda: gl.statistics_transaction(model).__enter__(),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"found no layer in a model of type .*: name its layers with layers="):
                use()
    with pytest.raises(ValueError, match="found no dropout layer among the 3 layers of the model"):
        gl.mc_dropout(gl.Sequential(gl.Linear(4, 4), gl.ReLU()), x)
    # A function shows nothing, and is run as it is.
    mean, variance = gl.mc_dropout(lambda x: 2 * x, x, passes=3)
    assert_same_bits(mean, 2 * x)
    assert_same_bits(variance, np.zeros_like(x))
    mean, _ = gl.mc_dropout(functools.partial(np.multiply, 2), x, passes=3)
    assert_same_bits(mean, 2 * x)
