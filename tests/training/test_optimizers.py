"""Optimizers against PyTorch's, step by step."""

import numpy as np
import pytest
import torch

from gpu_layers.training import SGD, Adam
from tests.inputs import normal

SHAPES = {"0.weight": (3, 2), "0.bias": (3,), "1.scale": ()}
CASES = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "momentum_decay": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}),
    "adam": (Adam, torch.optim.Adam, {"lr": 0.01}),
    "adam_options": (Adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
}


def _parameters(dtype, seed=0):
    return {name: np.array(normal(shape, seed=seed + i), dtype) for i, (name, shape) in enumerate(SHAPES.items())}


# 20 steps of a handful of roundings each, of parameters and changes of about 1.
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 2e-14)])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_torch(case, dtype, tolerance):
    ours, theirs, options = CASES[case]
    parameters = _parameters(dtype)
    arrays = dict(parameters)
    exact = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in parameters.items()}
    optimizer, expected = ours(parameters, **options), theirs(exact.values(), **options)
    for step in range(20):
        gradients = _parameters(dtype, seed=100 + 10 * step)
        if step == 10:
            optimizer.lr = 0.05
            expected.param_groups[0]["lr"] = 0.05
        before = {name: value.copy() for name, value in gradients.items()}
        # Not every step has a gradient for every parameter.
        missing = {name: None for place, name in enumerate(gradients) if (step + place) % 4 == 0 or step < 5 * place}
        optimizer.step(gradients | missing)
        for name, parameter in exact.items():
            parameter.grad = None if name in missing else torch.from_numpy(gradients[name])
        expected.step()
        for name, parameter in exact.items():
            np.testing.assert_allclose(
                parameters[name], parameter.detach().numpy(), rtol=0, atol=tolerance, err_msg=f"{name}, step {step}"
            )
            np.testing.assert_array_equal(gradients[name], before[name])
    assert all(parameters[name] is array for name, array in arrays.items()), "updated in place"
    assert all(value.dtype == dtype for value in parameters.values())


# Version 0.2 counted no updates of parameters: every step was one of each.
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_continues_from_its_state_bit_for_bit(case, counted):
    kind, _, options = CASES[case]
    whole, stopped = _parameters(np.float32), _parameters(np.float32)
    first = kind(whole, **options)
    before = kind(stopped, **options)
    for step in range(4):
        first.step(_parameters(np.float32, seed=100 + step))
        if step < 2:
            before.step(_parameters(np.float32, seed=100 + step))
    after = kind(stopped, **options)
    state = before.state_dict()
    after.load_state_dict({name: state[name] for name in state if counted or not name.startswith("updates.")})
    for step in (2, 3):
        after.step(_parameters(np.float32, seed=100 + step))
    for name, value in whole.items():
        np.testing.assert_array_equal(stopped[name], value)


def test_refuses_another_optimizers_state():
    sgd, adam = SGD(_parameters(np.float32)), Adam(_parameters(np.float32))
    with pytest.raises(ValueError, match="state of another optimizer: missing keys"):
        adam.load_state_dict(sgd.state_dict())
    state = adam.state_dict()
    adam.step(_parameters(np.float32))
    kept = adam.state_dict()
    with pytest.raises(ValueError, match=r"size mismatch for square\.0\.bias"):
        adam.load_state_dict({**state, "square.0.bias": np.zeros(4, np.float32)})
    for name, value in adam.state_dict().items():
        np.testing.assert_array_equal(value, kept[name])


def test_refuses_gradients_that_do_not_fit():
    parameters = _parameters(np.float32)
    optimizer, start = SGD(parameters), _parameters(np.float32)
    gradients = _parameters(np.float32, seed=5)
    for broken, error, message in (
        ({}, ValueError, "call backward first"),
        ({**gradients, "more": gradients["0.bias"]}, ValueError, "got a difference in ..more"),
        ({**gradients, "1.scale": np.zeros(2, np.float32)}, ValueError, "size mismatch for 1.scale"),
        ({**gradients, "1.scale": np.zeros(())}, TypeError, "dtype mismatch for 1.scale"),
        ({**gradients, "1.scale": 1.0}, TypeError, "^expected a numpy.ndarray or cupy.ndarray, got float$"),
        (None, TypeError, "^gradients must be a mapping of names to arrays, got NoneType$"),
    ):
        with pytest.raises(error, match=message):
            optimizer.step(broken)
        for name, value in parameters.items():
            np.testing.assert_array_equal(value, start[name])


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        (SGD, {"lr": -1}, ValueError),
        (SGD, {"lr": float("nan")}, ValueError),
        (SGD, {"lr": "fast"}, TypeError),
        (SGD, {"momentum": 1.0}, ValueError),
        (SGD, {"weight_decay": -0.1}, ValueError),
        (SGD, {"parameters": [np.zeros(3)]}, TypeError),
        (SGD, {"parameters": {"scale": np.float32(1)}}, TypeError),
        (Adam, {"betas": (0.9, 1.0)}, ValueError),
        (Adam, {"betas": (0.9,)}, ValueError),
        (Adam, {"betas": 0.9}, TypeError),
        (Adam, {"eps": float("inf")}, ValueError),
    ],
)
def test_bad_configuration(kind, options, error):
    with pytest.raises(error):
        kind(**{"parameters": _parameters(np.float32)} | options)


def test_refuses_half_precision_parameters():
    with pytest.raises(TypeError, match=r"parameter 0\.bias must be float32 or float64, got float16"):
        SGD({"0.bias": np.zeros(3, np.float16)})


def test_parameters_that_share_memory_are_refused():
    weight = np.lib.stride_tricks.as_strided(np.ones(3, np.float32), (2, 3), (0, 4))
    for make in (SGD, Adam):
        with pytest.raises(
            ValueError, match="more than one element of the written-to tensor refers to a single memory"
        ):
            make({"weight": weight})
