"""What all tests share: the markers ``gpu`` and ``slow``."""

import os
import warnings
from functools import cache

import pytest

from gpu_layers.runtime.cuda import require_gpu

# As many processes as processors run at a time: threads of their own only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Files that take minutes, longest first: what begins last runs alone.
_LONGEST = (
    "gates/test_compiled_code.py",
    "runtime/test_compilation.py",
    "parity/test_sanitizers.py",
    "parity/test_schedules.py",
    "parity/test_cases.py",
    "parity/test_checked.py",
    "study/test_page.py",
)


def _turn(item):
    """When a test's turn is: its file's, in order of collection within."""
    path = item.path.as_posix()
    return next((turn for turn, name in enumerate(_LONGEST) if path.endswith(f"tests/{name}")), len(_LONGEST))


def pytest_collection_modifyitems(config, items):
    """The longest files first; leave out what takes minutes, unless it is asked for: -m slow."""
    items.sort(key=_turn)
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: ask for it with -m slow"))


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
