"""The reference and the kernels are two floors of one house: the same functions, called alike."""

import inspect

import pytest

from gpu_layers import kernels, reference


def calling_convention(function):
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


def test_both_have_the_same_functions():
    assert len(reference.__all__) > 10
    assert sorted(kernels.__all__) == sorted(reference.__all__)


@pytest.mark.parametrize("name", reference.__all__)
def test_both_take_the_same_arguments(name):
    assert calling_convention(getattr(kernels, name)) == calling_convention(getattr(reference, name))


@pytest.mark.parametrize("name", [name for name in reference.__all__ if name.endswith("_forward")])
def test_every_forward_has_a_backward(name):
    assert name.replace("_forward", "_backward") in reference.__all__
