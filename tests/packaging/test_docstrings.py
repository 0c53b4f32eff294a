"""Docstrings say what goes in, what comes out, and every error."""

import inspect
import re

import pytest

import gpu_layers as gl
from gpu_layers import distributed, training

MODULES = {"gpu_layers": gl, "gpu_layers.ops": gl.ops, "training": training, "distributed": distributed}
PUBLIC = {
    f"{name}.{public}": getattr(module, public)
    for name, module in MODULES.items()
    for public in module.__all__
    if callable(getattr(module, public))
}
OPERATIONS = {
    name: one for name, one in PUBLIC.items() if name.startswith("gpu_layers.ops.") and inspect.isroutine(one)
}
LAYERS = {name: one for name, one in PUBLIC.items() if inspect.isclass(one) and issubclass(one, gl.Layer)}
#: Classes that only the library makes.
MADE_WITHIN = {"BatchStatistics", "Graph", "IncompatibleKeys", "Moments", "Progress", "Settings", "Dataset"}


def members():
    """Functions, classes, and the methods that a class of this library defines, each once, with its docstring."""
    found = {}
    for name, one in PUBLIC.items():
        found.setdefault(one, name)
        if inspect.isclass(one):
            for method, function in inspect.getmembers(one, inspect.isroutine):
                if not method.startswith("_") and getattr(function, "__module__", "").startswith("gpu_layers"):
                    found.setdefault(function, f"{name}.{method}")
    return {name: one for one, name in found.items()}


MEMBERS = members()


def sections(one):
    return set(re.findall(r"^(\w+)\n-+$", inspect.getdoc(one) or "", re.MULTILINE))


def parameters(one):
    if inspect.isclass(one) and one.__init__ is object.__init__ and one.__new__ is object.__new__:
        return []
    try:
        names = list(inspect.signature(one).parameters)
    except (TypeError, ValueError):
        return []
    return [name for name in names if name != "self"]


@pytest.mark.parametrize("name", MEMBERS)
def test_parameters_and_results_are_described(name):
    one = MEMBERS[name]
    text = inspect.getdoc(one)
    assert text, name
    headings = re.findall(r"^(\w+)\n-+$", text, re.MULTILINE)
    assert len(headings) == len(set(headings)), name
    short = name.rpartition(".")[2]
    if short.endswith("Saved") or short in MADE_WITHIN:
        return  # records: their attributes
    # One parameter that the summary names needs no section.
    named = [parameter for parameter in parameters(one) if re.search(rf"\b{re.escape(parameter)}\b", text)]
    has_forwarded = parameters(one) == ["args", "kwargs"]
    if len(parameters(one)) > 1 and not has_forwarded:
        assert "Parameters" in sections(one), name
    if not has_forwarded:
        assert named == parameters(one), (name, set(parameters(one)) - set(named))
    returns = getattr(one, "__annotations__", {}).get("return")
    if not inspect.isclass(one) and str(returns) not in ("None", "Iterator[None]") and len(parameters(one)) > 1:
        assert "Returns" in sections(one), name


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_say_every_section(name):
    assert {"Parameters", "Returns", "Raises"} <= sections(OPERATIONS[name]), name


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("method", ["forward", "backward"])
def test_passes_of_layers_say_every_section(name, method):
    if name == "gpu_layers.Layer" and method == "forward":
        return  # subclasses define it
    assert {"Parameters", "Returns", "Raises"} <= sections(getattr(LAYERS[name], method)), name


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_arguments_say_what_they_refuse(name):
    signature = inspect.signature(LAYERS[name].__init__)
    given = [one.annotation for one in signature.parameters.values() if one.name != "self"]
    if LAYERS[name] is not gl.Layer and set(given) - {"bool"}:  # any truth value is taken
        assert {"Parameters", "Raises"} <= sections(LAYERS[name]), name


@pytest.mark.parametrize("name", LAYERS)
def test_signatures_are_not_hidden(name):
    kinds = {one.kind for one in inspect.signature(LAYERS[name].__init__).parameters.values()}
    if name != "gpu_layers.Layer" and not issubclass(LAYERS[name], gl.Sequential):
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, name


def test_every_layer_class_is_seen():
    assert len(LAYERS) >= 42
    assert len(OPERATIONS) >= 32
