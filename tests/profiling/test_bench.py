"""The command, as it is used."""

import json

import pytest

from gpu_layers.catalogue import HEADLINE
from gpu_layers.catalogue.pooling import MAX_POOL
from profiling.bench import Runner, _left_out, main, parser
from profiling.cases import Case
from profiling.devices import EmulatedDevice
from profiling.implementations import CompiledTorch, Torch
from profiling.results import Run

ONE = ["--emulated", "--only", "^relu forward .*float32", "--peers", "^(copy|torch)$"]


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


def test_a_run_that_ended_early_is_resumed(tmp_path, capsys):
    path = tmp_path / "a.json"
    assert main([*ONE, "--json", str(path)]) == 0
    whole = Run.load(path)
    dropped = whole.rows.pop(0)
    whole.rows[0].notes = ["measured before"]
    del whole.rows[0].timings["torch"]
    whole.rows[0].missing["torch"] = "not there"
    whole.copy_gb_per_s = 7.0
    whole.save(path)
    assert main([*ONE, "--json", str(path), "--csv", str(tmp_path / "a.csv"), "--resume"]) == 0
    resumed = Run.load(path)
    assert [row.case for row in resumed.rows] == [whole.rows[0].case, dropped.case]
    assert resumed.rows[0] == whole.rows[0]
    assert resumed.copy_gb_per_s == 7.0
    assert resumed.left_off == []
    # A peer that was not there yet: the row is measured anew, in its place.
    more = ["--emulated", "--only", "^relu forward .*float32", "--peers", "^(copy|torch|cupy)$", "--resume"]
    assert main([*more, "--json", str(path)]) == 0
    assert [row.case for row in Run.load(path).rows] == [row.case for row in resumed.rows]
    assert all(
        "cupy" in row.timings | row.missing and "measured before" not in row.notes for row in Run.load(path).rows
    )
    assert main([*ONE, "--json", str(tmp_path / "new.json"), "--resume"]) == 0
    capsys.readouterr()
    other = Run.load(path)
    other.environment["sources"] = "0123"
    other.save(path)
    assert main([*ONE, "--json", str(path), "--resume"]) == 2
    assert "has another sources (0123) than this run" in capsys.readouterr().err


def test_results_are_there_after_each_row(tmp_path, monkeypatch):
    found = []
    right = Runner.run

    def run(self, case, skip):
        found.append([len(Run.load(path).rows), len(csv.read_text().splitlines()) - 1] if path.exists() else None)
        return right(self, case, skip)

    path, csv = tmp_path / "a.json", tmp_path / "a.csv"
    monkeypatch.setattr(Runner, "run", run)
    assert main([*ONE, "--json", str(path), "--csv", str(csv)]) == 0
    assert found == [None, [1, 1]]


def test_a_device_that_is_gone_ends_the_run_and_the_case_is_named(tmp_path, capsys, monkeypatch):
    class Lost(EmulatedDevice):
        def is_lost(self):
            return True

    def broken(self, *arguments):
        raise RuntimeError("an illegal memory access")

    path = tmp_path / "a.json"
    monkeypatch.setattr("profiling.bench.EmulatedDevice", Lost)
    monkeypatch.setattr(Runner, "_fill", broken)
    assert main([*ONE, "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "STOPPED: the device stopped responding after case relu forward 6x40 float32" in out
    run = Run.load(path)
    assert [(row.case, row.correct) for row in run.rows] == [("relu forward 6x40 float32", False)]
    assert run.left_off == ["relu forward 2x8x9x10 float32"]


def test_rounds_begin_with_what_matters_most(capsys):
    assert main(["--list", "--quick"]) == 0
    names = capsys.readouterr().out.splitlines()
    head = [operation.name for operation in HEADLINE]
    rounds = [name.split() for name in names]
    assert [words[0] for words in rounds[:6]] == head
    first = [words for words in rounds if words[3] == "bfloat16"]
    assert first == rounds[: len(first)], "one dtype after the other"
    # Each operation has had a turn before any has its second.
    operations = {words[0] for words in rounds}
    assert {words[0] for words in rounds[: len(operations)]} == operations
    assert {tuple(words[1:4:2]) for words in rounds[: len(operations)]} == {("forward", "bfloat16")}
    assert main(["--list", "--quick", "--first", "--dtypes", "bfloat16"]) == 0
    telling = capsys.readouterr().out.splitlines()
    assert telling == names[: len(telling)]
    assert {name.split()[0] for name in telling if "backward" in name and "channels_last" in name} > {"batch_norm"}
    assert main(["--list", "--first", "--headline", "--dtypes", "bfloat16"]) == 0
    assert {name.split()[0] for name in capsys.readouterr().out.splitlines()} == set(head)


def test_one_read_against_two(tmp_path):
    path = tmp_path / "a.json"
    arguments = ["--emulated", "--quick", "--dtypes", "float32", "--peers", "^(copy|two reads)$"]
    assert main([*arguments, "--only", "^(batch_norm|relu) ", "--json", str(path)]) == 0
    rows = {row.case: row for row in Run.load(path).rows}
    both = {case for case, row in rows.items() if "two reads" in row.timings}
    assert {case for case in rows if case.startswith("batch_norm ")} == both
    assert any("channels_last" in case for case in both)
    assert rows["relu forward 6x40 float32"].missing["two reads"] == "measured for plain batch norm"
    assert not [note for row in rows.values() for note in row.notes if "other results" in note]


@pytest.mark.parametrize(("peers", "left_out"), [(None, True), ("^torch.compile$", False)])
def test_slow_peers_are_left_out_of_a_quick_run_unless_asked_for(peers, left_out):
    options = parser().parse_args(["--quick", *(["--peers", peers] if peers else [])])
    skip = _left_out(options, Case(MAX_POOL, "forward", MAX_POOL.shapes[0], "bfloat16", channels_last=True))
    assert (skip(CompiledTorch) is not None) == left_out
    assert skip(Torch) is None
    telling = _left_out(options, Case(MAX_POOL, "forward", MAX_POOL.shapes[0], "bfloat16"))
    assert telling(CompiledTorch) is None


def test_list(capsys):
    assert main(["--list", "--quick", "--only", "^avg_pool forward"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8  # two shapes, two layouts, two dtypes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lstm"], "no case is named like 'lstm': the operations are dropout, channel_dropout"),
        (
            ["--peers", "lstm"],
            "no peer is named like 'lstm': there are copy, torch, torch.compile, jax, cupy, two reads",
        ),
        (["--only", "("], "is not a regular expression"),
        (["--compare", "nowhere.json"], "nowhere.json cannot be read"),
        (["--resume"], "--resume needs the file of the run to go on with"),
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
        pytest.skip("GPU: there is one")
    assert main(["--only", "relu"]) == 2
    assert "no usable GPU" in capsys.readouterr().err
