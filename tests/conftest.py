"""What all tests share: the marker ``gpu``."""

import warnings
from functools import cache

import pytest

from gpu_layers.runtime.cuda import require_gpu


@cache
def _why_no_gpu():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what CuPy says of its surroundings when it is imported
        try:
            require_gpu()
        except RuntimeError as error:
            return str(error)
    return None


def pytest_runtest_setup(item):
    """Skip the tests that need a GPU, with the reason, where there is none."""
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
        pytest.skip(reason)
