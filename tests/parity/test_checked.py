"""Every kernel with every memory access watched: no overrun, no uninitialised read, no data race."""

import pytest

from gpu_layers.verification import emulated_backend
from tests.parity.cases import CASES, fast_results, results


# float16 has the accesses of bfloat16.
@pytest.mark.parametrize("case", [case for case in CASES if str(case.dtype) != "float16"], ids=str)
def test_clean_in_checked_mode(case):
    """And the bits are those of the fast mode, which test_cases compares with the reference."""
    assert results(case, emulated_backend(check=True)) == fast_results(case)
