"""Results survive a round trip, are compared beyond noise, and are refused when they are something else."""

import csv
import json

import pytest

from profiling.results import ResultsError, Row, Run, compare
from profiling.timing import Timing


def row(case="relu forward 8x8 float32", ours=10.0, **others):
    timings = {"ours": Timing(ours, ours * 0.99, ours * 1.01, 30)}
    timings |= {name: Timing(value, value, value, 30) for name, value in others.items()}
    return Row(case, "relu", "forward", "float32", [8, 8], False, 3_000_000, 3_000_000, timings=timings)


def run(*rows, kind="measured", **facts):
    return Run(kind, {"commit": "abc", "gpu": "H100"} | facts, 3000.0, list(rows))


def test_round_trip(tmp_path):
    one = row(torch=20.0)
    one.correct, one.error, one.asked = True, 0.25, [16, 8]
    one.missing, one.notes, one.model = {"jax": "not installed"}, ["reduced"], {"bytes": 3}
    original = run(one)
    original.overhead, original.left_off = [{"op": "relu", "us": 4.5}], ["dropout"]
    original.save(tmp_path / "new folder" / "run.json")
    assert Run.load(tmp_path / "new folder" / "run.json") == original
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["run.json"]


def test_peers_that_are_not_timed_again_stay():
    known = run(row(ours=4.0, torch=8.0, copy=3.0))
    known.put(row(ours=2.0, torch=6.0, compiled=5.0))
    (kept,) = known.rows
    assert {name: timing.median for name, timing in kept.timings.items()} == {
        "ours": 2.0,
        "torch": 6.0,
        "copy": 3.0,
        "compiled": 5.0,
    }
    smaller = row(ours=1.0)
    smaller.asked = [16, 8]
    known.put(smaller)
    assert set(known.rows[0].timings) == {"ours"}


def test_columns():
    one = row(ours=2.0, torch=5.0)
    assert one.gb_per_s == pytest.approx(1500.0)  # 3 MB in 2 us
    assert one.fraction(3000.0) == pytest.approx(0.5)
    assert one.ratio("torch") == pytest.approx(2.5)
    assert one.ratio("jax") is None
    assert one.fraction(None) is None


def test_csv(tmp_path):
    run(row(ours=2.0, torch=5.0)).save_csv(tmp_path / "run.csv", ["torch", "jax"])
    with (tmp_path / "run.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line["us"] == "2"
    assert line["fraction_of_copy"] == "0.5"
    assert line["torch_ratio"] == "2.5"
    assert line["jax_us"] == ""
    assert line["kind"] == "measured"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "is no result of a benchmark"),
        ("[]", "has no 'schema'"),
        ('{"schema": 0}', "has version 0 of the results, this is version 2"),
        ('{"schema": 2}', "is no result of a benchmark: 'rows'"),
        ('{"schema": 2, "kind": "guessed", "environment": {}, "rows": []}', "of kind 'guessed'"),
        ('{"schema": 2, "kind": "measured", "environment": {}, "rows": [{"timings": {}, "us": 1}]}', "unknown fields"),
        ('{"schema": 2, "kind": "measured", "environment": {}, "rows": [3]}', "is no result"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ResultsError, match=message):
        Run.load(tmp_path / "other.json")


def test_a_missing_file():
    with pytest.raises(ResultsError, match=r"nowhere.json cannot be read: No such file"):
        Run.load("nowhere.json")


def test_comparison_tells_changes_from_noise():
    old = run(row("a", 100.0), row("b", 100.0), row("c", 100.0), row("gone", 1.0), commit="old")
    new = run(row("a", 80.0), row("b", 130.0), row("c", 101.0), row("added", 1.0), commit="new")
    text = compare(old, new)
    assert text.splitlines()[0] == "old (H100) -> new (H100)"
    assert any(line.split()[:2] == ["faster", "a"] and line.endswith("-20%") for line in text.splitlines())
    assert any(line.split()[:2] == ["slower", "b"] and line.endswith("+30%") for line in text.splitlines())
    assert text.splitlines()[-1] == "2 changed beyond noise, 1 did not, 1 in one run only"


def test_a_reduced_shape_is_not_compared_with_the_whole_one():
    old, new = row("a", 100.0), row("a", 50.0)
    new.shape = [4, 8]
    assert compare(run(old), run(new)).endswith("0 changed beyond noise, 0 did not, 1 in one run only")


def test_kinds_are_not_mixed():
    with pytest.raises(ResultsError, match="cannot be compared with those that are measured"):
        compare(run(row()), run(row(), kind="emulated"))


def test_json_is_plain(tmp_path):
    run(row()).save(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["rows"][0]["timings"]["ours"]["median"] == 10.0
