"""From Nsight Compute's CSV to a short table, on a stored sample; and the commands around it, with stubs."""

import csv
from pathlib import Path

import pytest

from gpu_layers.catalogue import HEADLINE
from profiling.nsight import COMMON, SPECIAL, chosen, main, metrics_of, read, table
from profiling.results import ResultsError

SAMPLE = Path(__file__).with_name("ncu_sample.csv")


def test_the_numbers_in_the_units_of_the_columns():
    pool, merge = read(SAMPLE)
    assert pool["kernel"].startswith("max_pool_forward<__nv_bfloat16, unsigned char, 8, StaticWindow")
    assert "PoolWindow" not in pool["kernel"]
    assert pool["us"] == pytest.approx(51.30)
    assert pool["DRAM read MB"] == pytest.approx(102.77)
    assert pool["DRAM written MB"] == pytest.approx(38.53517)
    assert pool["DRAM %"] == pytest.approx(88.25)
    assert pool["occupancy %"] == pytest.approx(61.0)
    assert pool["memory stall"] == pytest.approx(14.2)
    assert pool["integer pipe %"] is None  # n/a
    assert merge["kernel"] == "batch_norm_merge_statistics<float>"
    assert merge["DRAM written MB"] == pytest.approx(0.00307)
    assert "barrier stall" not in merge  # not asked for


def test_table_and_csv(tmp_path, capsys):
    assert main(["table", str(SAMPLE), "--csv", str(tmp_path / "short.csv")]) == 0
    head, pool, _ = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "kernel"
    assert "38.54" in pool
    with (tmp_path / "short.csv").open() as file:
        assert [row["registers"] for row in csv.DictReader(file)] == ["48.0", "32.0"]
    assert table(read(SAMPLE)).splitlines()[1] == pool


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no kernel was profiled"), ("==ERROR== ERR_NVGPUCTRPERM - no permission\n", "==ERROR== ERR_NVGPUCTRPERM")],
)
def test_a_file_without_a_table(tmp_path, text, message):
    (tmp_path / "raw.csv").write_text(text)
    with pytest.raises(ResultsError, match=message):
        read(tmp_path / "raw.csv")


def test_missing_file(capsys):
    assert main(["table", "nowhere.csv"]) == 2
    assert "nowhere.csv cannot be read: No such file" in capsys.readouterr().err


def test_each_operation_has_its_metrics():
    assert "barrier stall" in metrics_of("batch_norm_inference")
    assert "integer pipe %" in metrics_of("dropout")
    assert "special functions %" in metrics_of("activation_dropout")
    assert "barrier stall" not in metrics_of("relu")
    assert all("DRAM read MB" in metrics_of(name) for name in ("relu", "max_pool"))


def test_one_operation(capsys):
    assert main(["calls", "max_pool/backward", "--emulated", "--channels-last"]) == 0
    assert capsys.readouterr().out == "max_pool backward 64x256x56x56 bfloat16 channels_last\n"
    assert [case.direction for case in chosen("batch_norm", "float32", False)] == ["forward", "backward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lstm"], "there is no operation 'lstm': the operations are dropout"),
        (["relu/sideways"], "relu has no pass 'sideways': forward, backward"),
        (["relu", "--channels-last"], "relu is not measured with channels last"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    assert main(["calls", "--emulated", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name in ("ncu", "nsys"):
        copy = f'while [ "$1" != --log-file ]; do shift; done; cp "{SAMPLE}" "$2"' if name == "ncu" else ""
        (folder / name).write_text(f'#!/bin/bash\necho "$GPU_LAYERS_PROFILE_RANGES $*" >>"{folder}/calls"\n{copy}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_ncu(stubs, tmp_path, capsys):
    assert main(["ncu", "max_pool/forward", str(tmp_path / "out"), "--dtype", "float32", "--channels-last"]) == 0
    call = (stubs / "calls").read_text()
    assert "--clock-control none" in call
    assert "dram__bytes_read.sum,dram__bytes_write.sum" in call
    assert call.endswith("-m profiling.nsight calls max_pool/forward --dtype float32 --channels-last\n")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "max_pool-forward.ncu-raw.csv",
        "max_pool-forward.ncu.csv",
    ]
    assert "max_pool_forward<__nv_bfloat16" in capsys.readouterr().out


def test_nsys(stubs):
    assert main(["nsys", "dropout", "report"]) == 0
    assert main(["nsys", "report", "--", "python3", "train.py"]) == 0
    profile, stats, other, _ = (stubs / "calls").read_text().splitlines()
    assert profile.startswith("1 profile --trace=cuda,nvtx")
    assert profile.endswith("-m profiling.nsight calls dropout --dtype bfloat16 --calls 10")
    assert stats.endswith("report.nsys-rep")
    assert other.endswith("--output=report python3 train.py")


def test_the_status_of_a_tool_that_fails(stubs):
    (stubs / "nsys").write_text("#!/bin/bash\nexit 9\n")
    assert main(["nsys", "dropout"]) == 9


@pytest.mark.parametrize("name", ["ncu", "nsys"])
def test_missing_tools_and_bad_usage(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main([name, "relu"]) == 2
    assert f"{name} was not found: it comes with the CUDA toolkit" in capsys.readouterr().err
    assert main([name, "lstm"]) == 2
    assert "there is no operation 'lstm'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([name])


def test_only_a_time_line_is_of_any_program(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["ncu", "out", "--", "python3", "train.py"])
    assert "only nsys takes a command" in capsys.readouterr().err


def test_the_headline_operations_are_one_run():
    cases = chosen("headline", "bfloat16", False)
    first = [case for case in cases if not case.channels_last]
    assert [case.operation for case in first[::2]] == list(HEADLINE)
    assert {case.direction for case in cases} == {"forward", "backward"}
    last = cases[len(first) :]
    assert last == chosen("headline", "bfloat16", True)
    assert {case.operation.name for case in last} == {one.name for one in HEADLINE if True in one.layouts}
    special = {name for columns in SPECIAL.values() for name in columns}
    assert set(metrics_of("headline")) == set(COMMON) | special
