"""A layer that is called several times within another, against a layer of its own for each call."""

import copy
import threading
import weakref

import numpy as np
import pytest
import torch

import gpu_layers as gl
from gpu_layers.catalogue import LAYERS, LayerExample
from gpu_layers.runtime import ranges
from gpu_layers.training import SGD, Adam
from tests.inputs import BFLOAT16, assert_all_same_bits, assert_same_bits, normal, unchanged

DTYPES = [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: Batch, channels, spatial sizes: odd, and pooled twice with something left.
SIZES = (3, 4, 7, 6, 5)


def made(example):
    """How a layer is made, with parameters of any values."""

    def make(dtype, generator):
        layer = example.make(dtype, generator)
        for seed, values in enumerate(vars(layer).get("parameters", {}).values()):
            values[...] = normal(values.shape, seed=20 + seed)
        return layer

    return make, example.axes


def two_layers(dtype, generator):
    return gl.ReLU(), gl.Dropout(0.3, generator=generator)


#: Every layer that takes one array: how it is made, and the axes of its input.
MAKERS = {
    **{name: made(example) for name, example in LAYERS.items() if example.inputs == 1},
    "Flatten": made(LayerExample(gl.Flatten, axes=4)),
    "Linear": made(LayerExample(gl.Linear, (4, 4))),
    "Conv2d": made(LayerExample(gl.Conv2d, (4, 4, 3), {"padding": 1}, axes=4)),
    "Sequential": (lambda *made: gl.Sequential(*two_layers(*made)), 3),
    "Checkpoint": (lambda *made: gl.checkpoint(list(two_layers(*made))), 3),
}


class Passing(gl.Layer):
    """Does nothing."""

    def forward(self, x):
        return x

    def backward(self, dy):
        return dy


class Within(gl.Layer):
    """Another layer, under the name ``inner``."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)

    def backward(self, dy):
        return self.inner.backward(dy)


class Own(gl.Layer):
    """A layer of layers, written by hand."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.others = first, {"second": [second], "between": gl.ActivationDropout("tanh", 0.0)}

    def forward(self, x):
        return self.others["second"][0](self.others["between"](self.first(x)))

    def backward(self, dy):
        dy = self.others["between"].backward(self.others["second"][0].backward(dy))
        return self.first.backward(dy)


def between():
    return gl.ActivationDropout("tanh", 0.0)


def container(first, second):
    """A row that is there twice, where its layer is."""
    one = gl.Sequential(first, between())
    return gl.Sequential(one, gl.ReLU(), one if first is second else gl.Sequential(second, between()))


FORMS = {
    "row": lambda first, second: gl.Sequential(first, between(), second),
    "nested": lambda first, second: gl.Sequential(gl.Sequential(first, between()), gl.Sequential(second)),
    "deep": lambda first, second: gl.Sequential(first, gl.Sequential(between(), gl.Sequential(second))),
    "container": container,
    "own": Own,
    "own in a row": lambda first, second: gl.Sequential(gl.ReLU(), Own(first, second)),
}


def by_layer(network, layer):
    """The container's gradients of a layer, by the layer's names."""
    names = [name for name, one in network.named_layers() if one is layer]
    return {name: network.gradients[f"{names[0]}.{name}"] for name in vars(layer)["parameters"] if layer.parameters}


def check_like_separate_layers(form, make, x, training):
    shared = make(x.dtype, gl.Generator(7))
    first, second = make(x.dtype, gl.Generator(7)), make(x.dtype, gl.Generator(7, 1))
    network, separate = FORMS[form](shared, shared), FORMS[form](first, second)
    for one in (network, separate):
        one.train(training)
    expected = separate(x)
    dy = normal(expected.shape, x.dtype, seed=3)
    with unchanged(x, dy):
        # Twice: the second forward and backward owe nothing to the first.
        for step in range(2):
            if step:
                for layer, offset in ((shared, 0), (first, 0), (second, 1)):
                    for _, one in layer.named_layers():
                        if getattr(one, "generator", None):
                            one.generator.set_state({"seed": 7, "offset": offset})
                expected = separate(x)
            assert_same_bits(network(x), expected)
            dx = separate.backward(dy)
            for _ in range(2):
                assert_same_bits(network.backward(dy), dx)
                for name, gradient in by_layer(network, shared).items():
                    total = by_layer(separate, second)[name] + by_layer(separate, first)[name]
                    assert_same_bits(gradient, total, name)


def test_every_layer_is_tried():
    layers = {name for name in gl.layers.__all__ if issubclass(getattr(gl.layers, name), gl.Layer)}
    # Those of two inputs: below, and in test_dropout_add.py.
    of_two = {"DropoutAdd", "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d"}
    assert layers - {"Layer", *of_two} == set(MAKERS)


@each_dtype
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("form", FORMS)
def test_twice_is_like_two(form, kind, dtype):
    make, rank = MAKERS[kind]
    check_like_separate_layers(form, make, normal(SIZES[:rank], dtype, seed=1), True)


@pytest.mark.parametrize("kind", MAKERS)
def test_twice_in_evaluation(kind):
    make, rank = MAKERS[kind]
    check_like_separate_layers("row", make, normal(SIZES[:rank], np.float32, seed=1)[::-1], False)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_unpooling_twice(rank):
    pool = getattr(gl, f"MaxPool{rank}d")(2, return_indices=True)

    class Twice(gl.Layer):
        def __init__(self, first, second):
            super().__init__()
            self.unpools = first, second

        def forward(self, x, *indices):
            for unpool, one in zip(self.unpools, indices, strict=True):
                x = unpool(x, one)
            return x

        def backward(self, dy):
            for unpool in reversed(self.unpools):
                dy = unpool.backward(dy)
            return dy

    makes = getattr(gl, f"MaxUnpool{rank}d")
    unpool = makes(2)
    networks = Twice(unpool, unpool), Twice(makes(2), makes(2))
    half, first = pool(normal((2, 3, *(8,) * rank)))
    quarter, second = pool(half)
    results = [
        (network(quarter, second, first), network.backward(normal((2, 3, *(8,) * rank)))) for network in networks
    ]
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


def test_three_calls_and_four_layers_deep():
    """Sums in the order of backward: the last call's gradient first."""

    def network(layers):
        inner = gl.Sequential(layers[1], gl.ReLU())
        return gl.Sequential(layers[0], between(), gl.Sequential(gl.Sequential(inner), between()), layers[2])

    shared = MAKERS["Linear"][0](np.float32, None)
    separate = [MAKERS["Linear"][0](np.float32, None) for _ in range(3)]
    x, dy = normal((5, 4), np.float32), normal((5, 4), np.float32, seed=1)
    ours, theirs = network([shared] * 3), network(separate)
    assert_same_bits(ours(x), theirs(x))
    assert_same_bits(ours.backward(dy), theirs.backward(dy))
    for name in ("weight", "bias"):
        first, second, third = (layer.gradients[name] for layer in separate)
        assert_same_bits(ours.gradients[f"0.{name}"], (third + second) + first)
        assert_same_bits(shared.gradients[name], ours.gradients[f"0.{name}"])
    assert list(ours.parameters) == list(ours.gradients) == ["0.weight", "0.bias"]


def test_against_torch():
    linear = MAKERS["Linear"][0](np.dtype(np.float64), None)
    network = gl.Sequential(linear, gl.ReLU(), linear, gl.Sequential(gl.ReLU(), linear))
    x, dy = normal((5, 4)), normal((5, 4), seed=1)
    network(x)
    dx = network.backward(dy)
    weight, bias = (torch.tensor(value, requires_grad=True) for value in linear.parameters.values())
    xt = torch.tensor(x, requires_grad=True)
    yt = xt
    for number in range(3):
        yt = torch.nn.functional.linear(yt.relu() if number else yt, weight, bias)
    yt.backward(torch.tensor(dy))
    # Three products of 4 and sums over 5: some tens of roundings of 1.1e-16, of values of about 10.
    for ours, theirs in (
        (dx, xt.grad),
        (linear.gradients["weight"], weight.grad),
        (linear.gradients["bias"], bias.grad),
    ):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-13)


def tied(transposed):
    first, second = gl.Linear(4, 3, bias=False, seed=1), gl.Linear(3, 4, bias=False, seed=2)
    if transposed:
        second.parameters["weight"] = first.parameters["weight"].T
    else:
        first, second = gl.Linear(3, 3, bias=False, seed=1), gl.Linear(3, 3, bias=False, seed=2)
        second.parameters["weight"] = first.parameters["weight"]
    return gl.Sequential(first, gl.ReLU(), second)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_one_array_in_two_layers(transposed, optimizer):
    network = tied(transposed)
    start = network[0].parameters["weight"].copy()
    copies = gl.Sequential(*(copy.deepcopy(layer) for layer in network))
    x = normal((5, start.shape[1]), np.float32)
    dy = normal((5, network[2].parameters["weight"].shape[0]), np.float32, seed=1)
    for one in (network, copies):
        one(x)
    assert_same_bits(network.backward(dy), copies.backward(dy))
    assert list(network.parameters) == list(network.gradients) == ["0.weight"]
    assert list(network.state_dict()) == ["0.weight", "2.weight"]
    second = copies.gradients["2.weight"]
    total = copies.gradients["0.weight"] + (second.T if transposed else second)
    assert_same_bits(network.gradients["0.weight"], total)
    assert_same_bits(network[2].gradients["weight"], total.T if transposed else total)
    # One step of one parameter, whether the optimizer sees one name or both.
    expected = {"weight": start.copy()}
    optimizer(expected, 0.1).step({"weight": total})
    optimizer(network.parameters, 0.1).step(network.gradients)
    assert_same_bits(network[0].parameters["weight"], expected["weight"])
    network[0].parameters["weight"][...] = start
    both = {f"{place}.weight": network[place].parameters["weight"] for place in (0, 2)}
    for gradients in (copies.gradients, {f"{place}.weight": network[place].gradients["weight"] for place in (0, 2)}):
        network[0].parameters["weight"][...] = start
        optimizer(both, 0.1).step(gradients)
        assert_same_bits(network[0].parameters["weight"], expected["weight"])


def test_backwards_by_hand_of_tied_layers_are_added_where_they_are_read():
    network = tied(False)
    network(normal((5, 3), np.float32))
    dy = normal((5, 3), np.float32, seed=1)
    for layer in reversed(network.layers):
        dy = layer.backward(dy)
    parts = [network[place].gradients["weight"] for place in (0, 2)]
    assert_same_bits(network.gradients["0.weight"], parts[0] + parts[1])


def test_nothing_grows_where_nobody_calls_backward():
    linear = gl.Linear(3, 3)
    network = gl.Sequential(linear, gl.Sequential(gl.ReLU(), linear), Own(linear, linear))
    seen = []
    for _ in range(6):
        x = normal((2, 3), np.float32)
        seen.append(weakref.ref(x))
        network(x)
        del x
    assert [one() is not None for one in seen] == [False] * 5 + [True]
    network.to("cpu")
    assert seen[-1]() is None


def test_the_forward_before_is_forgotten_as_soon_as_the_next_one_gets_on():
    class Looking(Passing):
        def forward(self, x):
            alive.append(first() is not None)
            return x

    alive, linear = [], gl.Linear(3, 3)
    network = gl.Sequential(linear, Looking(), linear)
    x = normal((2, 3), np.float32)
    first = weakref.ref(x)
    network(x)
    del x
    network(normal((2, 3), np.float32, seed=1))
    assert alive == [True, False]


def test_a_bare_backward_is_that_of_the_last_forward():
    relu = gl.ReLU()
    x, dy = np.array([[1.0, -1.0], [-3.0, 2.0]]), np.ones((2, 2))

    class Negative(gl.Layer):
        def forward(self, x):
            return -x

        def backward(self, dy):
            return -dy

    network = gl.Sequential(relu, Negative(), relu)
    network(x)
    assert (network.backward(dy) == 0).all()
    # The last one saw what is negative, or 0.
    assert (relu.backward(dy) == 0).all()
    relu(x)
    assert_same_bits(relu.backward(dy), (x > 0).astype(float))
    assert (network.backward(dy) == 0).all()
    assert_same_bits(relu.backward(dy), (x > 0).astype(float))


def test_last_call_says_which_forward_is_meant():
    relu, x = gl.ReLU(), np.array([1.0, -2.0, 3.0])
    relu(x)
    first = relu.last_call
    relu(-x)
    relu.last_call = first
    assert_same_bits(relu.backward(x), np.array([1.0, 0, 3]))
    relu.last_call = None
    with pytest.raises(RuntimeError, match=r"ReLU\.backward was called before forward"):
        relu.backward(x)
    network = gl.Sequential(relu, gl.Linear(3, 3, seed=1), relu)
    rows = normal((2, 3), np.float32)
    network(rows)
    saved, dx = network.last_call, network.backward(rows)
    network(rows + 1)
    network.last_call = saved
    assert_same_bits(network.backward(rows), dx)


def test_last_call_has_what_was_none_too():
    class Masked(gl.Layer):
        def forward(self, x, mask=None):
            self.mask = mask
            return x if mask is None else x * mask

        def backward(self, dy):
            return dy if self.mask is None else dy * self.mask

    layer, x = Masked(), np.ones(3)
    layer(x)
    first = layer.last_call
    layer(x, mask=np.zeros(3))
    second = layer.last_call
    for saved, total in ((first, 3), (second, 0), (first, 3)):
        layer.last_call = saved
        assert layer.backward(x).sum() == total


def test_what_is_forgotten_by_hand_is_forgotten_whole():
    network = gl.Sequential(gl.ReLU(), gl.Sequential(gl.Linear(3, 3)))
    x = normal((2, 3), np.float32)
    network(x)
    for _, layer in network.named_layers():
        layer._saved = None
    with pytest.raises(RuntimeError, match=r"Linear\.backward was called before forward"):
        network.backward(x)


def test_branches_in_any_order_by_last_call():
    class Branches(Within):
        def forward(self, x, z):
            y = super().forward(x)
            self.first = self.inner.last_call
            return y * super().forward(z)[0, 0]

        def backward(self, dy):
            self.inner.last_call = self.first
            return super().backward(dy)

    x, z = normal((2, 3), np.float32), normal((4, 3), np.float32, seed=1)
    layer, plain = Branches(gl.Linear(3, 3, seed=1)), gl.Linear(3, 3, seed=1)
    layer(x, z)
    plain(x)
    assert_same_bits(layer.backward(x), plain.backward(x))
    assert_same_bits(layer.gradients["inner.weight"], plain.gradients["weight"])


def test_what_is_put_in_a_forward_is_that_of_the_last_call():
    class Replaces(Within):
        def forward(self, x):
            self.inner(x[2])
            kept = self.inner.last_call
            self.inner(x[0])
            self.inner(x[1])
            self.inner.last_call = kept
            return x

        def backward(self, dy):
            return np.stack([self.inner.backward(np.ones(3)) for _ in range(3)])

    layer, x = Replaces(gl.ReLU()), np.eye(3) - 0.5
    layer(x)
    assert_same_bits(layer.backward(x), np.eye(3)[[2, 0, 2]])


def test_a_call_that_was_chosen_is_chosen_for_one_backward():
    class Branches(Within):
        def forward(self, x):
            self.calls = []
            for rows in x:
                self.inner(rows)
                self.calls.append(self.inner.last_call)
            return x

        def backward(self, dy):
            self.inner.last_call = self.calls[1]
            # And then in their order, the last call first.
            return np.stack([self.inner.backward(np.ones(3)) for _ in range(3)])

    layer = Branches(gl.ReLU())
    x = np.eye(3) - 0.5
    layer(x)
    assert_same_bits(layer.backward(x), np.eye(3)[[1, 2, 1]])


class Scale(gl.Layer):
    """Keeps its input under a name of its own, counts its calls, and writes its gradient into the dict."""

    def __init__(self):
        super().__init__()
        self.parameters["scale"] = np.full((), 2.0)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.x = x
        return x * self.parameters["scale"]

    def backward(self, dy):
        self.gradients["scale"] = (dy * self.x).sum()
        return dy * self.parameters["scale"]


class Flags(gl.Layer):
    """Keeps what it needs in a dict, a list and a flag, which the first call leaves as it was."""

    def __init__(self):
        super().__init__()
        self.cache, self.positive, self.list = {}, True, None

    def forward(self, x):
        self.cache["x"] = x
        self.list = [x.sum(), x]
        self.positive = bool(x.sum() > 0)
        return x**2 if self.positive else -3 * x * x.sum()

    def backward(self, dy):
        total, x = self.list
        assert x is self.cache["x"]
        return 2 * dy * x if self.positive else -3 * (dy * total + (dy * x).sum())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_layer_written_by_hand_may_keep_it_in_containers(form, sign):
    x = sign * np.abs(normal((4, 3)))
    shared = Flags()
    network, separate = FORMS[form](shared, shared), FORMS[form](Flags(), Flags())
    between = [layer for one in (network, separate) for _, layer in one.named_layers() if hasattr(layer, "activation")]
    for layer in between:
        # Not positive: the second call takes the other way.
        layer.activation = "sigmoid"
        layer.forward = lambda x, layer=layer: -type(layer).forward(layer, x)
        layer.backward = lambda dy, layer=layer: -type(layer).backward(layer, dy)
    for _ in range(2):
        assert_same_bits(network(x), separate(x))
        assert_same_bits(network.backward(x), separate.backward(x))


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_written_by_hand_may_keep_what_it_needs_anywhere(form):
    x = normal((4, 3))
    shared, first, second = Scale(), Scale(), Scale()
    network, separate = FORMS[form](shared, shared), FORMS[form](first, second)
    for _ in range(2):
        assert_same_bits(network(x), separate(x))
        assert_same_bits(network.backward(x), separate.backward(x))
        total = second.gradients["scale"] + first.gradients["scale"]
        assert_same_bits(np.asarray(by_layer(network, shared)["scale"]), np.asarray(total))
    assert shared.calls == 4
    assert shared.x is not x


def test_what_a_backward_counts_stays_counted():
    class Counts(gl.Layer):
        def __init__(self):
            super().__init__()
            self.forwards = self.backwards = 0

        def forward(self, x):
            self.forwards += 1
            return x

        def backward(self, dy):
            self.backwards += 1
            return dy

    counts, x = Counts(), np.ones(3)
    network = gl.Sequential(counts, gl.ReLU(), gl.Sequential(counts, counts))
    for step in range(1, 3):
        network(x)
        network.backward(x)
        assert (counts.forwards, counts.backwards) == (3 * step, 3 * step)


def test_what_a_backward_frees_stays_freed():
    class Frees(gl.Layer):
        def forward(self, x):
            self.x = x
            return x * x

        def backward(self, dy):
            dx, self.x = 2 * dy * self.x, None
            return dx

    frees, x = Frees(), np.array([3.0])
    network = gl.Sequential(frees, gl.Sequential(frees))
    network(x)
    assert_same_bits(network.backward(np.ones(1)), 4 * x**3)
    assert frees.x is None


class FailingLinear(gl.Linear):
    """Its backwards fail from a number of them on, when its gradients are assigned."""

    before_failing = 1

    def backward(self, dy):
        dx = super().backward(dy)
        self.before_failing -= 1
        if self.before_failing < 0:
            raise ArithmeticError
        return dx


@pytest.mark.parametrize("wrap", [lambda layer: layer, Within, lambda layer: Within(Within(layer))])
def test_a_backward_that_raises_leaves_the_gradients_of_the_calls_before(wrap):
    failing, last, x = FailingLinear(3, 3, seed=2), gl.Linear(3, 3, seed=2), normal((2, 3), np.float32)
    shared = wrap(failing)
    network = gl.Sequential(shared, gl.ReLU(), shared)
    separate = gl.Sequential(gl.Linear(3, 3, seed=2), gl.ReLU(), last)
    network(x)
    separate(x)
    separate.backward(x)
    with pytest.raises(ArithmeticError):
        network.backward(x)
    assert failing.gradients.keys() == last.gradients.keys()
    assert_all_same_bits(failing.gradients, last.gradients)


@pytest.mark.parametrize("wrap", [lambda layer: layer, lambda layer: gl.Sequential(layer)])
def test_a_backward_that_is_refused_leaves_the_gradients_of_the_calls_before(wrap):
    class Mistaken(Within):
        def forward(self, x):
            return self.inner(self.inner(x))

        def backward(self, dy):
            return self.inner.backward(self.inner.backward(dy)[:, :2])

    network, plain, x = Mistaken(wrap(gl.Linear(3, 3, seed=2))), gl.Linear(3, 3, seed=2), normal((2, 3), np.float32)
    network(x)
    plain(plain(x))
    plain.backward(x)
    with pytest.raises(ValueError, match="dy"):
        network.backward(x)
    assert len(network.gradients) == 2
    for name, value in network.gradients.items():
        assert_same_bits(value, plain.gradients[name.rpartition(".")[2]], name)


def test_names_that_a_user_may_give():
    """Attributes of common names are the user's own."""

    class Own(gl.Layer):
        def __init__(self):
            super().__init__()
            self._calls = self.calls = 0
            self.linear = gl.Linear(3, 3, seed=1)

        def forward(self, x):
            self._calls += 1
            self.saved = self._state = self._arrays = (x, x + 1)
            return self.linear(self.linear(x))

        def backward(self, dy):
            assert self._calls == self.calls + 1
            self.calls += 1
            return self.linear.backward(self.linear.backward(dy))

    layer = gl.Sequential(Own())
    x = normal((2, 3), np.float32)
    for _ in range(2):
        layer(x)
        layer.backward(x)
    assert (layer[0].calls, layer[0]._calls) == (2, 2)
    assert list(layer.state_dict()) == ["0.linear.weight", "0.linear.bias"]


def test_a_subclass_that_calls_its_base_is_called_once():
    class Louder(gl.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

        def backward(self, dy):
            return super().backward(2 * dy)

    class Row(gl.Sequential):
        def forward(self, x):
            return super().forward(x)

    x = normal((2, 3), np.float32)
    shared, first, second = (Louder(3, 3, seed=4) for _ in range(3))
    network, separate = Row(shared, gl.ReLU(), shared), gl.Sequential(first, gl.ReLU(), second)
    assert_same_bits(network(x), separate(x))
    assert_same_bits(network.backward(x), separate.backward(x))
    assert_same_bits(network.gradients["0.weight"], second.gradients["weight"] + first.gradients["weight"])


def test_a_method_of_an_ordinary_class_is_a_forward_too():
    class Doubles:
        def forward(self, x):
            self.x = x
            return x * x

        def backward(self, dy):
            return 2 * dy * self.x

    class Square(Doubles, gl.Layer):
        pass

    square, x = Square(), np.array([2.0, 3.0])
    network = gl.Sequential(square, square)
    assert network(x).tolist() == [16, 81]
    assert network.backward(np.ones(2)).tolist() == [32, 108]


def test_a_call_of_its_own_is_a_forward_too():
    class Called(gl.Layer):
        def __init__(self):
            super().__init__()
            self.relu = gl.ReLU()

        def __call__(self, x):
            return self.relu(-self.relu(x) + 1)

        def backward(self, dy):
            return self.relu.backward(-self.relu.backward(dy))

    layer = Called()
    network = gl.Sequential(layer, layer)
    assert network(np.array([0.5, 2.0, -1.0])).tolist() == [0.5, 1, 0]
    assert network.backward(np.ones(3)).tolist() == [1, 0, 0]


def test_forwards_by_their_name_and_layers_that_are_not_held():
    relu = gl.ReLU()

    class Uses(gl.Layer):
        def forward(self, x):
            return relu.forward(-relu.forward(x) + 1)

        def backward(self, dy):
            return relu.backward(-relu.backward(dy))

    layer = Uses()
    assert layer(np.array([0.5, 2.0, -1.0])).tolist() == [0.5, 0, 1]
    assert layer.backward(np.ones(3)).tolist() == [-1, 0, 0]


def test_backward_in_parts_of_the_only_call_is_added():
    class Parts(Within):
        def backward(self, dy):
            return super().backward(dy) + super().backward(2 * dy)

    x, dy = normal((2, 3), np.float32), normal((2, 3), np.float32, seed=1)
    layer = Parts(gl.Linear(3, 3, seed=1))
    layer(x)
    layer.backward(dy)
    one, two = dy.T @ x, (2 * dy).T @ x
    assert_same_bits(layer.gradients["inner.weight"], one + two)


def test_more_backwards_than_calls_are_an_error():
    class Greedy(Own):
        def backward(self, dy):
            return self.first.backward(super().backward(dy))

    relu = gl.ReLU()
    layer, x = Greedy(relu, relu), np.ones((2, 2))
    layer(x)
    with pytest.raises(RuntimeError, match=r"each call of ReLU\(\), .*: Greedy\.forward called it 2 times, got"):
        layer.backward(x)


def test_a_forward_that_raised_in_the_middle_is_no_forward():
    class Fails(Passing):
        def forward(self, x):
            if failing:
                raise ArithmeticError
            return x

    failing, x = [], normal((2, 3), np.float32)
    network = gl.Sequential(gl.Linear(3, 3), Fails(), gl.Linear(3, 3))
    network(x)
    dx = network.backward(x)
    with pytest.raises(TypeError):
        network(x.astype(int))
    # Nothing had begun.
    assert_same_bits(network.backward(x), dx)
    failing.append(True)
    with pytest.raises(ArithmeticError):
        network(x)
    with pytest.raises(RuntimeError, match=r"Sequential\.backward was called before forward: the last forward ended"):
        network.backward(x)
    failing.clear()
    network(x)
    assert_same_bits(network.backward(x), dx)


def test_a_backward_that_is_refused_changes_no_gradient():
    network = gl.Sequential(gl.Linear(3, 3), gl.ReLU(), gl.Linear(3, 2))
    x = normal((4, 3), np.float32)
    dy = network(x)
    network.backward(dy)
    before = dict(network.gradients)
    with pytest.raises(ValueError, match="dy must have the output's shape"):
        network.backward(dy[:1])
    assert all(network.gradients[name] is value for name, value in before.items())


def test_a_container_may_change_the_gradients_of_what_it_holds():
    class Clips(Within):
        def backward(self, dy):
            dx = super().backward(dy)
            self.inner.gradients = {"weight": np.full((3, 3), 2, np.float32), "bias": None}
            return dx

    linear, x = gl.Linear(3, 3, seed=1), normal((4, 3), np.float32)
    network = gl.Sequential(linear, gl.Sequential(Clips(linear)))
    network(x)
    network.backward(x)
    plain = gl.Linear(3, 3, seed=1)
    plain(x)
    plain.backward(x @ linear.parameters["weight"])
    assert_same_bits(network.gradients["0.weight"], np.float32(2) + plain.gradients["weight"])
    assert_same_bits(network.gradients["0.bias"], plain.gradients["bias"])


def test_old_gradients_are_let_go_as_soon_as_there_are_new_ones():
    class Looking(Passing):
        def backward(self, dy):
            if failing:
                raise ArithmeticError
            alive.append([one() is not None for one in old])
            return dy

    alive, old, failing = [], [], []
    network = gl.Sequential(gl.Linear(3, 3), Looking(), gl.Linear(3, 3))
    x = normal((4, 3), np.float32)
    for _ in range(2):
        network(x)
        network.backward(x)
        old.extend(weakref.ref(value) for value in network.gradients.values())
    assert alive == [[], [False] * 4]
    # With some of the new ones there is no way back.
    failing.append(True)
    with pytest.raises(ArithmeticError):
        network.backward(x)
    assert network[0].gradients == {}
    assert network[2].gradients.keys() == {"weight", "bias"}


def test_what_had_no_part_has_no_gradient():
    class Either(gl.Layer):
        def __init__(self):
            super().__init__()
            self.branches = [gl.Linear(3, 3, seed=1), gl.Linear(3, 3, seed=2)]
            self.chosen = 0

        def forward(self, x):
            return self.branches[self.chosen](x)

        def backward(self, dy):
            return self.branches[self.chosen].backward(dy)

    layer, x = gl.Sequential(Either()), normal((2, 3), np.float32)
    optimizer = SGD(layer.parameters, 0.5, momentum=0.5)
    for chosen in (0, 1):
        layer[0].chosen = chosen
        layer(x)
        layer.backward(x)
        before = layer.state_dict()
        assert layer.gradients.keys() == layer.parameters.keys()
        optimizer.step(layer.gradients)
        for name, value in layer.state_dict().items():
            taken = f"branches.{chosen}" in name
            assert (layer.gradients[name] is not None) == taken
            assert (value != before[name]).any() == taken


def test_a_forward_that_is_run_again_in_backward():
    """As recomputation does: what forward kept is forgotten, and the gradients are those of the second run."""

    class Again(Within):
        def forward(self, x):
            self.x = x
            y = super().forward(x)
            self.inner.last_call = None
            return y

        def backward(self, dy):
            self.inner(self.x)
            return super().backward(dy)

    shared, separate = gl.Linear(3, 3, seed=1), [gl.Linear(3, 3, seed=1) for _ in range(2)]
    x = normal((2, 3), np.float32)
    again = Again(gl.Sequential(shared, gl.ReLU(), shared))
    network = gl.Sequential(again, again)
    plain = gl.Sequential(*(layer for _ in range(2) for layer in (separate[0], gl.ReLU(), separate[1])))
    assert_same_bits(network(x), plain(x))
    assert again.inner.last_call == {"_saved": None, "_noted_calls": None}
    assert_same_bits(network.backward(x), plain.backward(x))
    # The sums over two calls of each are taken in another order: four terms; each rounds by 6e-8 of about 1.
    total = plain.gradients["0.weight"] + plain.gradients["2.weight"]
    np.testing.assert_allclose(network.gradients["0.inner.0.weight"], total, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_the_numbers_of_each_call_stay_on_the_device(backend):
    """A generator for CUDA graphs: each call has memory of its own, and keeps it."""
    with gl.use_backend(backend):
        x = np.ones((40, 5), np.float32)
        for make in (
            gl.Dropout,
            gl.AlphaDropout,
            lambda p, generator: gl.ActivationDropout("relu", p, generator=generator),
        ):
            layer = make(0.5, generator=gl.CudaGraphGenerator(3, device="cpu"))
            layers = [make(0.5, generator=gl.Generator(3, offset)) for offset in range(3)]
            network, separate = gl.Sequential(layer, gl.Sequential(layer, layer)), gl.Sequential(*layers)
            places = None
            for step in range(2):
                for offset, one in enumerate(layers):
                    one.generator.set_state({"seed": 3, "offset": 3 * step + offset})
                assert_same_bits(network(x), separate(x))
                assert_same_bits(network.backward(x), separate.backward(x))
                now = [layer._taken, *layer._taken_again]
                assert len(now) == 3
                assert places is None or all(one is other for one, other in zip(places, now, strict=True))
                places = now


def test_threads_have_forwards_of_their_own():
    def work(number):
        linear = gl.Linear(3, 3, seed=number)
        network = gl.Sequential(linear, gl.ReLU(), linear)
        x = normal((2, 3), np.float32, seed=number)
        for _ in range(30):
            network(x)
            network.backward(x)
        results[number] = network.gradients["0.weight"]

    results = {}
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(results)
    for number in range(4):
        work(number)
        assert_same_bits(together[number], results[number])


def test_with_ranges_of_a_profiler():
    events = []
    ranges._switch_on(events.append, lambda: None)
    try:
        check_like_separate_layers("nested", MAKERS["Linear"][0], normal((3, 4), np.float32), True)
    finally:
        ranges._switch_off()
    assert events.count("Linear.backward") == 2 * (2 + 4)


def test_copies_have_calls_of_their_own():
    linear = gl.Linear(3, 3, seed=1)
    network = gl.Sequential(linear, gl.ReLU(), linear)
    x = normal((2, 3), np.float32)
    network(x)
    other = copy.deepcopy(network)
    assert other[0] is other[2]
    assert other[0] is not linear
    network.backward(x)
    linear(x + 1)
    assert_same_bits(other.backward(x), network.backward(x))
    assert_same_bits(other[0].gradients["weight"], linear.gradients["weight"])
