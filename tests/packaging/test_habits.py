"""What stands in two places is the same in both: versions, pins, and the commands that help prints."""

import re
import subprocess
from pathlib import Path

import pytest

from gpu_layers import __version__
from gpu_layers.verification import all_cases
from profiling.covering import kernels_of
from tests import quick

ROOT = Path(__file__).resolve().parents[2]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_and_date_of_the_changelog_and_the_citation():
    version, date = re.search(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.M).groups()
    assert version == __version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in text("CITATION.cff")


@pytest.mark.parametrize("tool", ["ruff", "mypy", "clang-format"])
def test_pins_of_pre_commit_are_those_of_the_extra(tool):
    (pin,) = set(re.findall(rf'"({tool}==[\d.]+)"', text("pyproject.toml")))
    assert set(re.findall(rf'"({tool}==[^"]+)"', text(".pre-commit-config.yaml"))) == {pin}


def test_make_alone_prints_every_target():
    done = subprocess.run(["make", "--silent"], cwd=ROOT, capture_output=True, text=True, check=True)
    (phony,) = re.findall(r"^\.PHONY: help (.*)$", text("Makefile"), re.MULTILINE)
    assert re.findall(r"^  make (\S+)  ", done.stdout, re.MULTILINE) == phony.split()


def test_the_quick_tier_names_what_is_there():
    for name in (*quick.COLLECTED, *quick.LEFT_OUT):
        assert (ROOT / name).exists(), name


def test_the_quick_tier_runs_each_kernel_template_in_each_dtype():
    chosen = quick.parity_cases()
    everything, covered = set(), set()
    for case in all_cases():
        kernels = {name.split(",")[0].rstrip(">") for name in kernels_of(case)}
        everything |= kernels
        covered |= kernels if str(case) in chosen else set()
    assert covered == everything
    assert len(chosen) < 175
