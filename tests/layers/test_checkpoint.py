"""Layers whose forward is run again in backward: the same bits as without, and nothing kept but the input."""

import gc
import weakref

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.random import CudaGraphGenerator
from gpu_layers.training import SGD
from tests.inputs import assert_all_same_bits, assert_same_bits, normal

X, DY = normal((6, 5), np.float32), normal((6, 7), np.float32, seed=1)


def network(generator=None):
    generator = generator or gl.Generator(3)
    return gl.Sequential(
        gl.Linear(5, 8, seed=1),
        gl.BatchNorm1d(8),
        gl.Dropout(0.5, generator=generator),
        gl.ActivationDropout("gelu", 0.3, generator=generator),
        gl.Linear(8, 7, seed=2),
        gl.AlphaDropout(0.2, generator=generator),
    )


def parts(net):
    """Half of it run again, within a Sequential."""
    return gl.Sequential(gl.checkpoint(net[:4]), net[4:])


def nested(net):
    return gl.checkpoint([gl.checkpoint(net[:2]), gl.checkpoint([gl.checkpoint(net[2:4]), net[4:]])])


WRAPPED = {"whole": gl.checkpoint, "part": parts, "nested": nested, "fused": lambda net: gl.checkpoint(gl.fuse(net))}
each_way = pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)


def state_of(net):
    return list(net.state_dict().values())


def assert_same_steps(plain, wrapped, generators, steps=3):
    for _ in range(steps):
        assert_same_bits(wrapped(X), plain(X))
        for _ in range(2):  # a backward may be repeated
            assert_same_bits(wrapped.backward(DY), plain.backward(DY))
        assert_all_same_bits(wrapped.gradients.values(), plain.gradients.values())
        assert_all_same_bits(state_of(wrapped), state_of(plain))
        assert generators[0].offset == generators[1].offset


@each_way
def test_steps_are_the_same_bits_and_statistics_and_offsets_count_once(wrap):
    generators = gl.Generator(3), gl.Generator(3)
    assert_same_steps(network(generators[0]), wrap(network(generators[1])), generators)
    assert generators[0].offset == 9


@each_way
def test_numbers_that_lie_on_a_device(wrap):
    generators = (gl.Generator(3), CudaGraphGenerator(3, device="cpu"))
    assert_same_steps(network(generators[0]), wrap(network(generators[1])), generators)


@each_way
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_evaluation(wrap, backend):
    plain, wrapped = network(), wrap(network())
    with gl.use_backend(backend):
        for net in (plain, wrapped):
            net(X)
            net.eval()
        assert_same_bits(wrapped(X), plain(X))
        assert_same_bits(wrapped.backward(DY), plain.backward(DY))


def test_nothing_is_kept_but_the_input():
    class Probe(gl.Layer):
        """Keeps its input, as any layer does, and shows what became of it."""

        def forward(self, x):
            y = x + 1
            self._saved, self.seen = (x, y), weakref.ref(y)
            return y

        def backward(self, dy):
            return dy + 0 * self._saved[1]

    probe = Probe()
    block = gl.checkpoint([gl.Linear(5, 5, seed=0), probe, gl.Linear(5, 5, seed=1)])
    net = gl.Sequential(block, gl.ReLU())
    y = net(X)
    gc.collect()
    assert probe.seen() is None
    net.backward(np.ones_like(y))
    gc.collect()
    assert probe.seen() is None
    assert all(layer._saved is None for layer in block)


def test_a_layer_that_stands_in_several_places():
    def made(wrap):
        shared, drop = gl.Linear(5, 5, seed=0), gl.Dropout(0.5, generator=gl.Generator(3))
        return gl.Sequential(shared, drop, wrap([shared, drop, shared]), drop, shared, wrap([drop]))

    plain, wrapped = made(lambda layers: gl.Sequential(*layers)), made(gl.checkpoint)
    for _ in range(2):
        y = plain(X)
        assert_same_bits(wrapped(X), y)
        assert_same_bits(wrapped.backward(y), plain.backward(y))
        assert_same_bits(wrapped.gradients["0.weight"], plain.gradients["0.weight"])


def test_several_calls_of_one_checkpoint():
    class Twice(gl.Layer):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(self.inner(x)) + x

        def backward(self, dy):
            return self.inner.backward(self.inner.backward(dy)) + dy

    def inner():
        return gl.Sequential(gl.Linear(5, 5, seed=0), gl.Dropout(0.5, generator=gl.Generator(3)))

    plain, wrapped = Twice(inner()), Twice(gl.checkpoint(inner()))
    y = plain(X)
    assert_same_bits(wrapped(X), y)
    assert_same_bits(wrapped.backward(y), plain.backward(y))
    assert_same_bits(wrapped.gradients["inner.0.weight"], plain.gradients["inner.0.weight"])


@each_way
def test_statistics_of_a_transaction_count_once_or_not_at_all(wrap):
    plain, wrapped = network(), wrap(network())
    for net in (plain, wrapped):
        with gl.statistics_transaction(net):
            net(X)
            net.backward(DY)
        with pytest.raises(ValueError, match="dy must have"), gl.statistics_transaction(net):
            net.backward(net(X + 1)[:3])
    assert_all_same_bits(state_of(wrapped), state_of(plain))


def test_modes_are_those_of_the_forward():
    plain, wrapped = network(), gl.checkpoint(network())
    for net in (plain, wrapped):
        net(X)
        net.eval()
    assert_same_bits(wrapped.backward(DY), plain.backward(DY))
    assert not any(layer.training for layer in wrapped)


def test_arguments_are_those_of_the_forward():
    ids = np.array([5, 3, 9, 1, 0, 2])
    plain, wrapped = (gl.Sequential(gl.Linear(5, 7, seed=0), gl.Dropout(0.5, generator=gl.Generator(3))) for _ in "ab")
    wrapped = gl.checkpoint(wrapped)
    assert_same_bits(wrapped(X, sample_ids=ids), plain(X, sample_ids=ids))
    assert_same_bits(wrapped.backward(DY), plain.backward(DY))


def test_names_modes_and_layers_are_those_of_the_sequential():
    net = gl.Sequential({"first": gl.Linear(5, 7), "drop": gl.Dropout()}).eval()
    block = gl.checkpoint(net)
    assert list(block.parameters) == ["first.weight", "first.bias"]
    assert block.layers == net.layers
    assert not block.training
    assert repr(block).startswith("Checkpoint(")
    assert list(gl.checkpoint(gl.Linear(5, 7)).parameters) == ["0.weight", "0.bias"]


def test_what_was_written_over_is_noticed():
    net = gl.checkpoint(network())
    net(X)
    SGD(net.parameters, lr=0.1).step({name: np.ones_like(value) for name, value in net.parameters.items()})
    with pytest.raises(RuntimeError, match=r"0\.weight, of shape .*, was written to after the forward"):
        net.backward(DY)
    in_place = gl.checkpoint([gl.Dropout(0.5, inplace=True)])
    in_place(X.copy())
    with pytest.raises(RuntimeError, match=r"x, of shape .*, was written to after the forward"):
        in_place.backward(X)


def test_a_batch_norm_that_normalises_by_what_it_updates_is_refused():
    norm = gl.BatchNorm1d(5)
    norm.use_batch_statistics = False
    with pytest.raises(ValueError, match="normalises by statistics that it updates"):
        gl.checkpoint([norm])(X)


def test_errors():
    with pytest.raises(RuntimeError, match=r"Checkpoint\.backward was called before forward"):
        gl.checkpoint([gl.ReLU()]).backward(X)
    with pytest.raises(TypeError, match="expected a Layer, got int"):
        gl.checkpoint([1])
    with pytest.raises(TypeError, match="got Checkpoint, whose forward may be another"):
        gl.checkpoint(gl.checkpoint([gl.ReLU()]))
    net = gl.checkpoint(network())
    net(X)
    expected = net.backward(DY)
    with pytest.raises(ValueError, match="dy must have"):
        net.backward(X)
    assert net[1].update_statistics is None
    assert_same_bits(net.backward(DY), expected)


def test_a_forward_that_draws_more_masks_than_at_first_is_an_error():
    class Growing(gl.Layer):
        calls = 0

        def __init__(self):
            super().__init__()
            self.drop = gl.Dropout(0.5)

        def forward(self, x):
            Growing.calls += 1
            for _ in range(Growing.calls):
                x = self.drop(x)
            return x

        def backward(self, dy):
            return dy

    block = gl.checkpoint([Growing()])
    block(X)
    with pytest.raises(RuntimeError, match="expected the forward to draw the same masks again, got more"):
        block.backward(X)
