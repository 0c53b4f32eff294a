"""The command, as it is used."""

import json

import pytest

from profiling.bench import main
from profiling.results import Run

ONE = ["--emulated", "--only", "^relu forward .*float32", "--peers", "^(copy|torch)$", "--no-overhead"]


def test_everything_is_written_and_marked(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path)]
    assert main([*ONE, *arguments]) == 0
    out = capsys.readouterr().out
    assert out.startswith("EMULATED on ")
    assert "relu forward 6x40 float32" in out
    run = Run.load(tmp_path / "a.json")
    assert run.kind == "emulated"
    assert [row.case for row in run.rows] == ["relu forward 6x40 float32", "relu forward 2x8x9x10 float32"]
    assert {"date", "commit", "sources", "python", "numpy", "torch", "cpu"} <= run.environment.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json", "bars.png", "roofline.png"]


def test_comparison_with_an_older_run(tmp_path, capsys):
    old = str(tmp_path / "old.json")
    assert main([*ONE, "--json", old]) == 0
    data = json.loads((tmp_path / "old.json").read_text())
    for row in data["rows"]:
        row["timings"]["ours"] |= {"median": 1e9, "low": 1e9, "high": 1e9}
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert main([*ONE, "--compare", old]) == 0
    assert "2 changed beyond noise, 0 did not, 0 in one run only" in capsys.readouterr().out


def test_a_measured_run_is_not_compared_with_an_emulated_one(tmp_path, capsys):
    Run("measured", {}).save(tmp_path / "gpu.json")
    assert main([*ONE, "--compare", str(tmp_path / "gpu.json")]) == 2
    assert "results that are emulated cannot be compared with those that are measured" in capsys.readouterr().err


def test_time_that_does_not_suffice(capsys):
    assert main([*ONE, "--budget", "1e-9"]) == 0
    assert "The time did not suffice for 2 more: relu forward 6x40 float32" in capsys.readouterr().out


def test_list(capsys):
    assert main(["--list", "--quick", "--only", "^avg_pool forward"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8  # two shapes, two layouts, two dtypes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lstm"], "no case is named like 'lstm': the operations are dropout, relu"),
        (["--peers", "lstm"], "no peer is named like 'lstm': there are copy, torch, torch.compile, jax, cupy"),
        (["--only", "("], "is not a regular expression"),
        (["--compare", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, capsys):
    assert main(["--emulated", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_of_another_version(tmp_path, capsys):
    (tmp_path / "old.json").write_text('{"schema": 99}')
    assert main(["--emulated", "--compare", str(tmp_path / "old.json")]) == 2
    assert "has version 99 of the results, this is version 2" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--only", "relu"]) == 2
    assert "no usable GPU" in capsys.readouterr().err
