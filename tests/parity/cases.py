"""The verification's cases as tests take them."""

import pytest

from gpu_layers.verification import all_cases, differences

CASES = list(all_cases())

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def check(case, backend):
    wrong = [difference.message for difference in differences(case, backend) if difference.ratio > 1]
    assert not wrong, f"{case} on {backend.name}: " + "; ".join(wrong)


def results(case, backend):
    """What a case gives, as bytes by name."""
    inputs = {name: backend.place(array) for name, array in case.inputs().items()}
    with backend.activate():
        return {name: result.tobytes() for name, result in case.run(inputs).items()}
