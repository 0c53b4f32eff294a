"""What all tests share: the markers ``gpu`` and ``slow``, and for which reasons a test may be skipped."""

import gc
import os
import warnings
from functools import cache

import pytest

import gpu_layers as gl
from gpu_layers.core.cuda import require_gpu

# As many processes as processors run at a time: threads of their own only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


#: How the reason of a skip may begin. Any other is a failure: a package is missing that the extra ``test`` brings, say,
#: and whatever its tests show is not shown. (``--strict-skips``, which a plain ``pytest -o addopts=`` leaves out.)
ALLOWED_SKIPS = {
    "GPU: ": "there is none; or there is one, for what happens without",
    "slow: ": "minutes rather than seconds, unless asked for with -m slow",
    "JAX: ": "of all the peers that benchmarks compare with, the one that the extra does not bring",
    "browser: ": "a program of the system, which pip cannot bring; where CI is set its absence is a failure",
}


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


# In tests of these folders a warning is an error, unless they say otherwise.
_WITHOUT_WARNINGS = ("distributed", "examples", "layers", "ops")


def _turn(item):
    """When a test's turn is: its file's, in order of collection within."""
    path = item.path.as_posix()
    return next((turn for turn, name in enumerate(_LONGEST) if path.endswith(f"tests/{name}")), len(_LONGEST))


def pytest_addoption(parser):
    """Options of our own."""
    parser.addoption("--strict-skips", action="store_true", help="fail what is skipped for a reason that is not listed")
    parser.addoption("--quick", action="store_true", help="run the quick tier, which tests/quick.py describes")


def pytest_configure(config):
    """The quick tier is collected unless files are named."""
    if config.option.quick and config.args_source is not pytest.Config.ArgsSource.ARGS:
        from tests import quick

        config.args = quick.arguments()


def pytest_ignore_collect(collection_path, config):
    """Files that the quick tier leaves out."""
    if not config.option.quick:
        return None
    from tests import quick

    return collection_path in quick.ignored() or None


def _judged(report, config):
    """A skip for a reason that is not listed is a failure."""
    if config.option.strict_skips and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(tuple(ALLOWED_SKIPS)):
            report.outcome = "failed"
            report.longrepr = f"skipped for a reason that tests/conftest.py does not list: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Of a test."""
    return _judged((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Of a file that is skipped as a whole."""
    return _judged((yield), collector.config)


def pytest_collection_modifyitems(config, items):
    """The longest files first; leave out what takes minutes, unless it is asked for: -m slow."""
    items.sort(key=_turn)
    for item in items:
        if item.path.parent.name in _WITHOUT_WARNINGS and not item.get_closest_marker("filterwarnings"):
            item.add_marker(pytest.mark.filterwarnings("error"))
    if config.option.quick:
        _deselect_parity_cases(config, items)
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: ask for it with -m slow"))


@pytest.fixture(autouse=True, scope="module")
def _old_objects_stay():
    """Collections of garbage pass over what collected tests and earlier files have left, which is never collected.

    In the whole run each collection that a test asks for took some seconds.
    """
    gc.freeze()


def _deselect_parity_cases(config, items):
    """Of the parity tests leave the quick tier's cases."""
    from tests import quick

    names = quick.parity_cases()
    left_out = [
        item
        for item in items
        if item.path == quick.ROOT / quick.PARITY and str(item.callspec.params["case"]) not in names
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


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
        # Without CuPy, which the extra brings, nothing is known about a GPU.
        pytest.skip(reason.replace("no usable GPU", "GPU: none that is usable", 1))


@pytest.fixture
def default_generator():
    """The default generator, which has its state back afterwards."""
    before = gl.default_generator.get_state()
    yield gl.default_generator
    gl.default_generator.set_state(before)
