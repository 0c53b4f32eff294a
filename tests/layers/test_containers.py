"""Layers that hold layers: names as PyTorch's, modes, states, moves, the repr."""

import copy
import doctest
import pickle
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import gpu_layers as gl
from gpu_layers.training import SGD
from tests.inputs import assert_all_same_bits, assert_same_bits, normal


class Net(gl.Layer):
    """Layers in every place that has a name, and a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.parameters["scale"] = np.full(3, 2, np.float32)
        self.buffers["seen"] = np.zeros((), np.int64)
        self.entry = gl.Linear(3, 3, seed=1)
        self.blocks = [gl.BatchNorm1d(3), gl.Sequential(gl.ReLU(), gl.Linear(3, 3, bias=False, seed=2))]
        self.heads = {"wide": gl.Linear(3, 5, seed=3), "pair": (gl.Dropout(0.5), gl.BatchNorm1d(5))}
        self.size = (3, 5)
        self.empty = []

    def forward(self, x):
        self.x = self.blocks[1](self.blocks[0](self.entry(x)))
        dropout, norm = self.heads["pair"]
        return norm(dropout(self.heads["wide"](self.x * self.parameters["scale"])))

    def backward(self, dy):
        dropout, norm = self.heads["pair"]
        dy = self.heads["wide"].backward(dropout.backward(norm.backward(dy)))
        self.gradients = {"scale": (dy * self.x).sum(axis=0)}
        dy = dy * self.parameters["scale"]
        return self.entry.backward(self.blocks[0].backward(self.blocks[1].backward(dy)))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.entry = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([nn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3, bias=False))])
        pair = nn.ModuleList([nn.Dropout(0.0), nn.BatchNorm1d(5)])
        self.heads = nn.ModuleDict({"wide": nn.Linear(3, 5), "pair": pair})

    def forward(self, x):
        x = self.blocks[1](self.blocks[0](self.entry(x)))
        return self.heads["pair"][1](self.heads["pair"][0](self.heads["wide"](x * self.scale)))


def test_names_and_state_are_torchs():
    ours, theirs = Net(), TorchNet()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.parameters) == [name for name, _ in theirs.named_parameters()]
    assert list(ours.buffers) == [name for name, _ in theirs.named_buffers()]
    keys = ours.load_state_dict(theirs.state_dict())
    assert keys == ([], [])
    assert str(keys) == "<All keys matched successfully>"
    for name, value in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], value.numpy(), name)
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})


def test_training_is_torchs():
    torch.manual_seed(0)  # some weights bring values so close to ReLU's step that float32 and float64 differ
    ours, theirs = Net(), TorchNet()
    ours.load_state_dict(theirs.state_dict())
    ours.heads["pair"][0].p = 0.0
    theirs = theirs.double()
    x, dy = normal((7, 3), np.float32), normal((7, 5), np.float32, seed=1)
    xt = torch.tensor(x.astype(np.float64), requires_grad=True)
    yt = theirs(xt)
    yt.backward(torch.tensor(dy.astype(np.float64)))
    # float32 through eight layers of a few operations each; batch norm of seven samples scales by up to about 10.
    np.testing.assert_allclose(ours(x), yt.detach().numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.backward(dy), xt.grad.numpy(), rtol=0, atol=1e-4)
    assert ours.gradients.keys() == ours.parameters.keys()
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(ours.gradients[name], parameter.grad.numpy(), rtol=0, atol=2e-4, err_msg=name)


def test_modes_reach_everything():
    net = Net()
    assert net.eval() is net
    assert not any(layer.training for _, layer in net.named_layers())
    assert len(list(net.named_layers())) == 9
    net.heads["pair"][0].train()
    assert net.heads["pair"][0].training
    net.train()
    assert all(layer.training for _, layer in net.named_layers())


def test_a_mode_of_its_own_is_asked_for():
    class Frozen(gl.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    class Block(gl.Layer):
        def __init__(self):
            super().__init__()
            self.norm, self.relu = Frozen(3), gl.ReLU()

    block = gl.Sequential(Block()).train()
    assert (block[0].norm.training, block[0].relu.training) == (False, True)


def test_evaluation_is_deterministic_and_leaves_statistics():
    net, x = Net().eval(), normal((7, 3), np.float32)
    before = net.state_dict()
    assert_same_bits(net(x), net(x))
    assert_all_same_bits(net.state_dict(), before)


def test_parameters_are_the_arrays_themselves_and_assigning_reaches_the_layer():
    net = Net()
    assert net.parameters["heads.wide.bias"] is net.heads["wide"].parameters["bias"]
    new = np.ones(5, np.float32)
    net.parameters["heads.wide.bias"] = new
    assert net.heads["wide"].parameters["bias"] is new
    net.parameters.update({"scale": np.zeros(3, np.float32)})
    assert net.parameters["scale"].tolist() == [0, 0, 0]
    del net.parameters["entry.bias"]
    assert "bias" not in net.entry.parameters
    assert net.parameters.pop("entry.weight").shape == (3, 3)
    assert net.entry.parameters == {}
    with pytest.raises(KeyError, match=r"no layer 'body' for 'body\.weight'"):
        net.parameters["body.weight"] = new
    parameters = net.parameters
    parameters |= {"scale": new[:3]}
    assert net.parameters["scale"].tolist() == [1, 1, 1]
    assert isinstance(parameters, dict)
    assert type(copy.deepcopy(parameters)) is type(pickle.loads(pickle.dumps(parameters))) is dict
    net.gradients = {"scale": new[:3], "heads.wide.bias": new}
    assert net.heads["wide"].gradients == {"bias": new}
    assert list(net.gradients) == ["scale", "heads.wide.bias"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_parameter_of_its_own_may_have_a_dot(nested):
    class Flat(gl.Layer):
        def __init__(self):
            super().__init__()
            self.parameters["inner.scale"] = np.full(3, 2.0)
            if nested:
                self.inner = gl.Linear(3, 3, bias=False, dtype="float64", seed=1)

        def forward(self, x):
            self.x = x
            return x * self.parameters["inner.scale"]

        def backward(self, dy):
            self.gradients = {"inner.scale": (dy * self.x).sum(axis=0)}
            return dy * self.parameters["inner.scale"]

    layer, x = gl.Sequential(Flat()), normal((4, 3))
    layer(x)
    layer.backward(x)
    names = ["0.inner.scale", *(["0.inner.weight"] if nested else [])]
    assert list(layer.parameters) == list(layer.state_dict()) == names
    assert_same_bits(layer.gradients["0.inner.scale"], (x * x).sum(axis=0))


def test_layers_that_come_later():
    net = Net()
    net.empty.append(gl.Linear(2, 2))
    net.late = gl.ReLU()
    net.blocks = None
    assert [name for name, _ in net.named_children()] == [
        "entry", "heads.wide", "heads.pair.0", "heads.pair.1", "empty.0", "late",
    ]  # fmt: skip
    assert "empty.0.weight" in net.parameters
    assert not any(name.startswith("blocks") for name in net.state_dict())


def test_one_layer_under_two_names():
    class Two(gl.Layer):
        def __init__(self):
            super().__init__()
            self.a = gl.Linear(2, 2, bias=False)
            self.b = self.a
            self.order = [self.a, gl.BatchNorm1d(2)]

    class TorchTwo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2, bias=False)
            self.b = self.a
            self.order = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.BatchNorm1d(2)])

    ours, theirs = Two(), TorchTwo()
    # A list that repeats what has a name of its own gives no second one.
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours.parameters) == [name for name, _ in theirs.named_parameters()]
    state = ours.state_dict()
    with pytest.raises(ValueError, match=r"a\.weight and b\.weight are the same array here, but differ in the state"):
        ours.load_state_dict(state | {"a.weight": state["a.weight"] + 1})
    assert_same_bits(ours.a.parameters["weight"], state["a.weight"])
    # What diverged is equal to itself, too.
    diverged = np.array([[np.nan, 1], [np.inf, 2]], np.float32)
    ours.load_state_dict(state | {"a.weight": diverged, "b.weight": diverged.copy()})
    assert_same_bits(ours.b.parameters["weight"], diverged)
    with pytest.raises(ValueError, match="differ in the state"):
        ours.load_state_dict(state | {"a.weight": diverged, "b.weight": np.nan_to_num(diverged)})


@dataclass
class Pair(gl.Layer):
    first: gl.Layer
    second: gl.Layer

    def forward(self, x):
        return self.second(self.first(x))

    def backward(self, dy):
        return self.first.backward(self.second.backward(dy))


def test_a_data_class_is_a_layer():
    linear, x = gl.Linear(3, 3, seed=1), normal((2, 3), np.float32)
    pair, row = Pair(linear, linear), gl.Sequential(linear, linear)
    assert list(pair.state_dict()) == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert list(pair.parameters) == ["first.weight", "first.bias"]
    assert_same_bits(pair(x), row(x))
    dx = pair.backward(x)
    gradients = dict(pair.gradients)
    assert_same_bits(row.backward(x), dx)
    for name in ("weight", "bias"):
        assert_same_bits(row.gradients[f"0.{name}"], gradients[f"first.{name}"])
    assert not pair.eval().first.training


def test_circles():
    class Child(gl.Layer):
        pass

    parent, child = Net(), Child()
    parent.child, child.parent = child, parent
    parent.empty.append(parent.empty)
    parent.eval().to("cpu")
    assert not child.training
    assert not parent.training
    assert [name for name, _ in parent.named_layers()].count("child") == 1
    assert len(parent.state_dict()) == len(Net().state_dict())
    assert "..." in repr(parent)


@pytest.mark.parametrize("held", [{gl.ReLU()}, frozenset([gl.ReLU()])])
def test_a_set_gives_no_names(held):
    layer = gl.Layer()
    with pytest.raises(TypeError, match="odd must hold layers in an order, got a set"):
        layer.odd = held
    layer.fine = {1, 2}
    assert list(layer.named_children()) == []


@pytest.mark.parametrize("held", [{"a.b": gl.Linear(1, 1)}, {1: gl.Linear(1, 1), "1": gl.Linear(1, 1)}])
def test_keys_that_are_no_names(held):
    layer = gl.Layer()
    layer.parts = held
    with pytest.raises(ValueError, match="names of layers in parts must be unique and have no dot, got"):
        layer.state_dict()


def test_the_repr_is_torchs():
    class Block(gl.Layer):
        def __init__(self):
            super().__init__()
            self.norm = gl.BatchNorm1d(3)
            self.rest = [gl.ReLU()]

        def _configuration(self):
            return "kind='residual'"

    assert repr(gl.Sequential(Block())) == (
        "Sequential(\n  (0): Block(\n    kind='residual'\n"
        "    (norm): BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)\n"
        "    (rest.0): ReLU()\n  )\n)"
    )
    assert repr(gl.Sequential()) == "Sequential()"


def test_a_layer_of_this_library_with_a_layer_put_into_it():
    norm = gl.BatchNorm1d(3)
    norm.extra = gl.Dropout(0.5)
    norm.eval()
    assert not norm.extra.training
    assert list(norm.parameters) == ["weight", "bias"]
    norm.extra = gl.Linear(2, 2, bias=False)
    assert list(norm.state_dict()) == [
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "extra.weight",
    ]  # fmt: skip
    x = normal((4, 3), np.float32)
    assert_same_bits(norm(x), gl.BatchNorm1d(3).eval()(x))


def test_moving_keeps_what_is_shared():
    first, second, third = gl.Linear(3, 3), gl.Linear(3, 3), gl.Linear(3, 3)
    second.parameters["weight"] = first.parameters["weight"]
    third.parameters["weight"] = first.parameters["weight"].T
    network = gl.Sequential(first, gl.Sequential(second), third).to("cpu")
    assert list(network.parameters) == ["0.weight", "0.bias", "1.0.bias", "2.bias"]
    first.parameters["weight"][0, 1] = 7
    assert second.parameters["weight"][0, 1] == third.parameters["weight"][1, 0] == 7


def test_copies_and_pickles():
    net = gl.Sequential(Net(), gl.Sequential(gl.Linear(5, 2, seed=4)))
    net[1].append(net[1][0])
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(gl.Sequential(*net[1], gl.ReLU())))):
        assert type(other) is gl.Sequential
    other = copy.deepcopy(net)
    assert other[1][0] is other[1][1]
    assert other.parameters.keys() == net.parameters.keys()
    other.parameters["0.scale"][...] = 9
    assert net.parameters["0.scale"].tolist() == [2, 2, 2]


def test_nothing_of_training_is_loaded_with_the_library():
    code = "import sys, gpu_layers; print(*[name for name in sys.modules if name.startswith('gpu_layers.training')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == ""
    for name in ("Sequential", "Linear", "Conv2d", "Flatten"):
        assert getattr(gl, name).__module__.startswith("gpu_layers.layers.")
        assert getattr(gl.training, name) is getattr(gl, name)


# --- Sequential ---


def rows():
    return gl.Sequential(gl.Linear(3, 4, seed=1), gl.ReLU(), gl.Dropout(0.5), gl.Linear(4, 2, seed=2))


def test_a_sequential_is_a_sequence():
    network = rows()
    assert len(network) == 4
    assert list(network) == list(network.layers)
    assert network[0] is network.layers[0]
    assert network[-1] is network[np.int64(3)] is network.layers[3]
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"index {index} is out of range"):
            network[index]
    with pytest.raises(TypeError):
        network["0"]
    assert bool(gl.Sequential())
    assert len(gl.Sequential()) == 0
    relu = gl.ReLU(True)
    network[1] = relu
    assert network[1] is relu
    with pytest.raises(TypeError, match="expected a Layer, got int"):
        network[1] = 3
    with pytest.raises(TypeError, match="expected a Layer, got int"):
        network.append(3)
    with pytest.raises(TypeError, match="expected a Layer, got int"):
        gl.Sequential(relu, 3)


def test_slices_are_torchs():
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(4, 2))
    ours = rows().eval()
    for part in (slice(1, None), slice(None, 2), slice(None, None, -2), slice(2, 1)):
        assert list(ours[part].state_dict()) == list(theirs[part].state_dict())
        assert list(ours[part]) == list(ours.layers[part])
        assert ours[part].training is False
    x = normal((5, 3), np.float32)
    assert_same_bits(ours[2:](ours[:2](x)), ours(x))
    part = ours[3:].append(gl.Linear(2, 2)).extend([gl.ReLU()])
    assert [name for name, _ in part.named_children()] == ["3", "1", "2"]


def test_names_of_a_mapping():
    network = gl.Sequential({"first": gl.Linear(3, 3, seed=1), "act": gl.ReLU()})
    assert list(network.parameters) == ["first.weight", "first.bias"]
    assert repr(network).splitlines()[2] == "  (act): ReLU()"
    x = normal((5, 3), np.float32)
    assert_same_bits(network(x), np.maximum(network[0](x), 0))
    for name in ("", "a.b"):
        with pytest.raises(ValueError, match="the name of a layer must have characters and no dot"):
            gl.Sequential({name: gl.ReLU()})
    with pytest.raises(TypeError, match="expected a Layer, got int"):
        gl.Sequential({"a": 3})


def test_sample_ids_reach_the_layers_that_take_them():
    ids = np.array([5, 2, 2**40])

    class Takes(gl.Layer):
        def forward(self, x, **options):
            assert options["sample_ids"] is ids
            return x

        def backward(self, dy):
            return dy

    generators = [gl.Generator(number) for number in range(4)]
    x = normal((3, 4, 5), np.float32)
    first, second = (gl.Dropout(0.5, generator=one) for one in generators[:2])
    network = gl.Sequential(gl.BatchNorm1d(4), first, gl.Sequential(gl.ReLU(), second), Takes())
    expected = gl.BatchNorm1d(4)(x)
    expected = gl.Dropout(0.5, generator=gl.Generator(0))(expected, sample_ids=ids)
    expected = gl.Dropout(0.5, generator=gl.Generator(1))(np.maximum(expected, 0), sample_ids=ids)
    assert_same_bits(network(x, sample_ids=ids), expected)
    with pytest.raises(TypeError, match="no layer of this Sequential takes sample_ids"):
        gl.Sequential(gl.ReLU(), gl.Sequential(gl.Linear(5, 5)))(x, sample_ids=ids)
    with pytest.raises(TypeError, match="no layer of this Sequential takes mask"):
        network[1:3](x, mask=ids)


@pytest.mark.parametrize("channels_last", [False, True])
def test_lengths_and_masks_reach_the_layers_that_take_them(channels_last):
    lengths = np.array([5, 2, 3])
    x = normal((3, 5, 4) if channels_last else (3, 4, 5), np.float32)
    mask = np.arange(5) < lengths[:, None]
    norms = [gl.BatchNorm1d(4, channels_last=channels_last) for _ in range(2)]
    pool = gl.MaxPool1d(2, channels_last=channels_last)
    network = gl.Sequential(norms[0], gl.ReLU(), gl.Dropout(0.0), gl.Sequential(norms[1]), pool)
    plain = [gl.BatchNorm1d(4, channels_last=channels_last) for _ in range(2)]
    expected = pool(plain[1](np.maximum(plain[0](x, lengths=lengths), 0), lengths=lengths), lengths=lengths)
    assert_same_bits(network(x, lengths=lengths), expected)
    for layer in norms:
        layer.reset_running_stats()
    assert_same_bits(network[:4](x, mask=mask), network[:4](x, lengths=lengths))
    network.append(gl.BatchNorm1d(4, channels_last=channels_last))
    with pytest.raises(ValueError, match=r"lengths and mask belong to the input of shape .* but layer 5, BatchN"):
        network(x, lengths=lengths)


def test_fusing_keeps_names():
    network = gl.Sequential({"norm": gl.BatchNorm1d(3), "act": gl.ReLU(), "drop": gl.Dropout(0.5)})
    assert list(gl.fuse(network).state_dict()) == list(network.state_dict())
    assert list(gl.fuse(gl.Sequential(gl.ReLU(), *network)[1:]).parameters) == ["1.weight", "1.bias"]


@pytest.mark.parametrize("module", [gl.layers.base, gl.layers.sequential])
def test_the_examples_of_the_docstrings(module):
    assert doctest.testmod(module) == (0, {gl.layers.base: 11, gl.layers.sequential: 8}[module])


# --- optimizers ---


def test_an_optimizer_reads_the_parameters_of_the_network_at_each_step():
    network = rows()
    optimizer = SGD(network.parameters, 0.5, momentum=0.5)
    network.append(gl.Linear(2, 2, seed=3))
    moved = {name: value.copy() for name, value in network.parameters.items()}
    for layer in network:
        for name in layer.parameters:
            # As a move does.
            layer.parameters[name] = layer.parameters[name].copy()
    gradients = {name: np.ones_like(value) for name, value in moved.items()}
    for _ in range(2):
        optimizer.step(gradients)
    for name, value in network.parameters.items():
        assert_same_bits(value, moved[name] - np.float32(0.5) - np.float32(0.75))
    assert {name for name in optimizer.state_dict() if name.startswith("velocity.4")} == {
        "velocity.4.weight",
        "velocity.4.bias",
    }


def test_an_optimizer_of_one_layer():
    linear = gl.Linear(3, 2, bias=False, seed=1)
    optimizer = SGD(linear.parameters, 1.0)
    before = linear.parameters["weight"].copy()
    linear.parameters["weight"] = before.copy()
    optimizer.step({"weight": np.ones((2, 3), np.float32)})
    assert_same_bits(linear.parameters["weight"], before - 1)


def test_a_parameter_that_is_read_only_is_refused_before_anything_changes():
    network = rows()
    network[3].parameters["bias"].flags.writeable = False
    optimizer, before = SGD(network.parameters, 1.0), network.state_dict()
    with pytest.raises(ValueError, match=r"parameter 3\.bias is read-only"):
        optimizer.step({name: np.ones_like(value) for name, value in network.parameters.items()})
    assert_all_same_bits(network.state_dict(), before)
    assert optimizer.steps == 0


# --- initial weights ---


def test_manual_seed_decides_the_weights():
    def made():
        return [gl.Linear(3, 4), gl.Conv2d(2, 3, 3), gl.Linear(3, 4)]

    gl.manual_seed(5)
    first = made()
    offset = gl.default_generator.offset
    gl.manual_seed(5)
    second = made()
    gl.manual_seed(6)
    other = made()
    for one, two, three in zip(first, second, other, strict=True):
        assert_same_bits(one.parameters["weight"], two.parameters["weight"])
        assert (one.parameters["weight"] != three.parameters["weight"]).all()
    assert (first[0].parameters["weight"] != first[2].parameters["weight"]).all()
    # Masks are those of the seed, however many layers were made.
    assert offset == 0
    x = np.ones((4, 5), np.float32)
    gl.manual_seed(5)
    made()
    y = gl.Dropout(0.5)(x)
    assert_same_bits(y != 0, gl.ops.dropout_mask(20, 0.5, 5, 0).reshape(4, 5))
    # Not what a user's own data may be.
    gl.manual_seed(5)
    plain = np.random.default_rng(5).standard_normal((4, 3)) * np.sqrt(2 / 3)
    assert (np.abs(gl.Linear(3, 4).parameters["weight"] - plain) > 1e-6).all()


def test_a_seed_of_the_layer_comes_first():
    gl.manual_seed(5)
    seeded = gl.Linear(3, 4, seed=7).parameters["weight"]
    gl.manual_seed(6)
    assert_same_bits(gl.Linear(3, 4, seed=7).parameters["weight"], seeded)
    expected = np.random.default_rng(7).standard_normal((4, 3)) * np.sqrt(2 / 3)
    assert_same_bits(seeded, expected.astype(np.float32))
