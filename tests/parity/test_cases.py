"""Every kernel against the reference, over all cases of the verification."""

import pytest

from gpu_layers.verification import cuda_backend, emulated_backend
from tests.parity.cases import check, every_case


@every_case
def test_emulated(case):
    check(case, emulated_backend())


@pytest.mark.gpu
@every_case
def test_gpu(case):
    check(case, cuda_backend())
