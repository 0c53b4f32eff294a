"""The tools of the studies."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from gpu_layers import Generator, default_generator
from gpu_layers.study.claims import Criterion, Text, number
from gpu_layers.study.figures import draw
from gpu_layers.study.formulas import formula_svg
from gpu_layers.study.lab import Lab, different_bits
from gpu_layers.study.moons import bernoulli_cross_entropy, gradient_of_cost, moons, train
from gpu_layers.study.networks import StackedLinear
from gpu_layers.study.snippets import run_snippet
from gpu_layers.training import Linear


def test_stacked_linear_is_separate_linears():
    seeds = [np.random.default_rng(seed) for seed in range(3)]
    stacked = StackedLinear(3, 4, 5, seeds=seeds, dtype=np.float64)
    rng = np.random.default_rng(9)
    x, dy = rng.standard_normal((3, 7, 4)), rng.standard_normal((3, 7, 5))
    stacked.parameters["bias"][...] = rng.standard_normal((3, 1, 5))
    y, dx = stacked(x), stacked.backward(dy)
    for copy in range(3):
        single = Linear(4, 5, dtype="float64")
        weight, bias = stacked.parameters["weight"][copy].T, stacked.parameters["bias"][copy, 0]
        single.load_state_dict({"weight": weight, "bias": bias})
        # Sums of at most seven products: the same but for their order.
        np.testing.assert_allclose(y[copy], single(x[copy]), rtol=0, atol=1e-14)
        np.testing.assert_allclose(dx[copy], single.backward(dy[copy]), rtol=0, atol=1e-14)
        np.testing.assert_allclose(stacked.gradients["weight"][copy].T, single.gradients["weight"], atol=1e-14)
        np.testing.assert_allclose(stacked.gradients["bias"][copy, 0], single.gradients["bias"], atol=1e-14)


def test_moons_of_a_seed_are_the_same_whatever_others_there_are():
    few, many = moons(1), moons(3)
    np.testing.assert_array_equal(few.x_test[0], many.x_test[0])
    assert not np.array_equal(many.x_train[0], many.x_train[1])
    assert not np.array_equal(many.x_train[0], many.x_test[0])


def test_cost_and_its_gradient():
    rng = np.random.default_rng(1)
    logits, labels = 3 * rng.standard_normal((2, 5, 1)), rng.integers(0, 2, (2, 5, 1)).astype(float)
    cost, gradient = bernoulli_cross_entropy(logits, labels)
    p = 1 / (1 + np.exp(-logits))
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(axis=(1, 2))
    np.testing.assert_allclose(cost, expected, rtol=1e-13)
    step = 1e-6 * np.eye(10).reshape(10, 2, 5, 1)
    slopes = [
        (bernoulli_cross_entropy(logits + h, labels)[0].sum() - bernoulli_cross_entropy(logits - h, labels)[0].sum())
        / 2e-6
        for h in step
    ]
    # Rounding of costs of size 1 over steps of 1e-6.
    np.testing.assert_allclose(gradient.ravel(), slopes, atol=1e-9)
    assert np.isfinite(gradient_of_cost(np.full((1, 1, 1), -1e4), np.ones((1, 1, 1)))).all()


def test_copies_train_as_they_would_alone():
    """Without dropout, whose mask depends on the place in the stack, the seeds do not know of each other."""
    one, three = (train(Lab(), None, seeds=seeds, steps=200) for seeds in (1, 3))
    # float32 sums in another order, after 200 steps.
    np.testing.assert_allclose(one.costs[:, 0], three.costs[:, 0], rtol=1e-4)
    assert one.costs.shape == (3, 1)


@pytest.mark.parametrize(
    ("relation", "holds"), [("<=", [True, True, False]), (">=", [False, True, True]), ("==", [False, True, False])]
)
def test_criterion(relation, holds):
    criterion = Criterion(relation, 2, Text("", ""))
    assert [criterion.holds(value) for value in (1.9, 2.0, 2.1)] == holds
    assert not criterion.holds(float("nan"))


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (459.0, "459"), (1.23456, "1.23"), (1.7e-16, "1.7e-16"), (float("nan"), "nan")]
)
def test_numbers(value, text):
    assert number(value) == text


def test_different_bits():
    x = np.array([0.0, 1.0, np.nan])
    assert different_bits(x, x.copy()) == 0
    assert different_bits(x, np.array([-0.0, 1.0, np.nan])) == 1
    assert different_bits(x, x.astype(np.float32)) == 3
    assert different_bits(x[:0], x[:0]) == 0


def test_formula_is_one_path_in_the_colour_of_the_text():
    svg = ElementTree.fromstring(formula_svg(r"\frac{a}{b} < 1"))
    (path,) = svg
    assert path.get("fill") == "currentColor"
    assert path.get("d").startswith("M")
    assert svg.get("aria-label") == r"\frac{a}{b} < 1"
    left, top, width, height = map(float, svg.get("viewBox").split())
    numbers = [float(word) for word in path.get("d").translate(str.maketrans("MLQCZ", " " * 5)).split()]
    assert left <= min(numbers[::2])
    assert max(numbers[::2]) <= left + width
    assert top <= min(numbers[1::2])
    assert max(numbers[1::2]) <= top + height


def test_bad_formula():
    with pytest.raises(ValueError, match="frac"):
        formula_svg(r"\frac{a}")


def test_figures_in_both_languages_and_the_same_each_time():
    @draw("name", Text("", ""))
    def paint(figure, say, title):
        figure.subplots().set_title(say(title))

    one, other = (paint(Text("loss", "损失")) for _ in range(2))
    assert one == other
    assert ">loss<" in one.svg["en"]
    assert ">损失<" in one.svg["zh"]


def test_a_snippet_leaves_the_default_generator_alone():
    before = default_generator.get_state()
    assert run_snippet("print(gl.Dropout(0.5)(np.ones(3)).sum() >= 0)") == "True"
    assert default_generator.get_state() == before
    assert isinstance(default_generator, Generator)
