"""A test that is skipped for a reason that nobody has listed is a failure."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent / "conftest.py"


def outcomes(folder, content, *options):
    """Run pytest on one file with this project's conftest; its exit status and what it printed."""
    shutil.copy(CONFTEST, folder)
    (folder / "test_it.py").write_text(f"import pytest\n{content}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-ra", *options, "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout


TEST = "def test():\n    {}\n"
MISSING = "pytest.importorskip('no_such_package')"


@pytest.mark.parametrize(
    "content",
    [
        TEST.format(MISSING),
        TEST.format("pytest.skip('not today')"),
        f"{MISSING}\n{TEST.format('pass')}",
        "@pytest.mark.skipif(True, reason='no time')\n" + TEST.format("pass"),
        "@pytest.mark.skip\n" + TEST.format("pass"),
        "@pytest.fixture\ndef it():\n    pytest.skip('no thing')\ndef test(it):\n    pass\n",
    ],
)
def test_a_reason_that_is_not_listed(tmp_path, content):
    status, printed = outcomes(tmp_path, content, "--strict-skips")
    assert status in (1, 2)
    assert "skipped for a reason that tests/conftest.py does not list: " in printed
    # Where nothing was installed for the tests, what is there is run.
    status, printed = outcomes(tmp_path, content)
    assert status in (0, 5)
    assert "1 skipped" in printed


@pytest.mark.parametrize("marks", ["", "@pytest.mark.slow\n", "@pytest.mark.gpu\n"])
def test_reasons_that_are_listed(tmp_path, marks):
    register = ["-o", "markers=slow: s\ngpu: g"]
    content = marks + TEST.format("pytest.skip('JAX: not installed')")
    status, printed = outcomes(tmp_path, content, "--strict-skips", *register)
    assert status == 0
    assert "1 skipped" in printed


def test_an_expected_failure_is_no_skip(tmp_path):
    content = "@pytest.mark.xfail(reason='known')\n" + TEST.format("assert 0")
    status, printed = outcomes(tmp_path, content, "--strict-skips")
    assert status == 0
    assert "1 xfailed" in printed
