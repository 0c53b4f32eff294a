"""How many Python functions a call of ours enters, forward and backward: what the host's time is made of."""

import pytest

from profiling.torch_overhead import measure

# The engine's own twenty included, and what stands in for a floor.
MOST = {"Dropout": 53, "Dropout2d": 53, "BatchNorm2d": 66, "MaxPool2d": 48, "AvgPool2d": 44, "AdaptiveAvgPool2d": 44}


@pytest.fixture(scope="module")
def entries():
    return {entry["layer"]: entry for entry in measure(rounds=1, calls=2)}


@pytest.mark.parametrize("name", MOST)
def test_no_more_calls_than_there_were(entries, name):
    assert entries[name]["torch_calls"] < entries[name]["calls"] <= MOST[name]
