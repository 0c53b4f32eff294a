"""The verification's cases as tests take them."""

import hashlib
from functools import cache

import numpy as np
import pytest

from gpu_layers.verification import all_cases, differences, emulated_backend

CASES = list(all_cases())

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def check(case, backend):
    wrong = [difference.message for difference in differences(case, backend) if difference.ratio > 1]
    assert not wrong, f"{case} on {backend.name}: " + "; ".join(wrong)


def results(case, backend):
    """What a case gives, as digests of the bits by name."""
    inputs = {name: backend.place(array) for name, array in case.inputs().items()}
    with backend.activate():
        return {name: _bits(result) for name, result in case.run(inputs).items()}


@cache
def fast_results(case):
    """Those of the emulator's fast mode and the schedule that comes first, once in a process."""
    return results(case, emulated_backend())


def _bits(result):
    """All but what compilers are free to choose: which NaN it is."""
    if result.dtype.kind not in "iub":
        result = np.where(result == result, result, result.dtype.type(np.nan))
    return hashlib.blake2b(result.tobytes(), digest_size=16).hexdigest()
