"""Every kernel against the reference, over all cases of the verification."""

import pytest

from gpu_layers.verification import all_cases, cuda_backend, differences, emulated_backend

CASES = list(all_cases())


def check(case, backend):
    wrong = [difference.message for difference in differences(case, backend) if difference.ratio > 1]
    assert not wrong, f"{case} on {backend.name}: " + "; ".join(wrong)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated(case):
    check(case, emulated_backend())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gpu(case):
    check(case, cuda_backend())
