"""From Nsight Compute's CSV to a short table, on a stored sample; and the scripts around it, with stubs."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_layers.catalogue import HEADLINE
from profiling.ncu_table import COMMON, SPECIAL, main, metrics_of, read, table
from profiling.one import chosen
from profiling.one import main as one
from profiling.results import ResultsError

SAMPLE = Path(__file__).with_name("ncu_sample.csv")
SCRIPTS = Path(__file__).resolve().parents[2] / "profiling"


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
    assert main([str(SAMPLE), "--csv", str(tmp_path / "short.csv")]) == 0
    head, pool, _ = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "kernel"
    assert "38.54" in pool
    with (tmp_path / "short.csv").open() as file:
        assert [row["registers"] for row in csv.DictReader(file)] == ["48.0", "32.0"]
    assert table(read(SAMPLE)).splitlines()[1] == pool


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no kernel was profiled"),
        ("==ERROR== ERR_NVGPUCTRPERM - no permission\n", "==ERROR== ERR_NVGPUCTRPERM"),
    ],
)
def test_a_file_without_a_table(tmp_path, text, message):
    (tmp_path / "raw.csv").write_text(text)
    with pytest.raises(ResultsError, match=message):
        read(tmp_path / "raw.csv")


def test_missing_file(capsys):
    assert main(["nowhere.csv"]) == 2
    assert "nowhere.csv cannot be read: No such file" in capsys.readouterr().err


def test_each_operation_has_its_metrics():
    assert "barrier stall" in metrics_of("batch_norm_inference")
    assert "integer pipe %" in metrics_of("dropout")
    assert "special functions %" in metrics_of("activation_dropout")
    assert "barrier stall" not in metrics_of("relu")
    assert all("DRAM read MB" in metrics_of(name) for name in ("relu", "max_pool"))


def test_one_operation(capsys):
    assert one(["max_pool/backward", "--emulated", "--channels-last"]) == 0
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
    assert one(["--emulated", *arguments]) == 2
    assert message in capsys.readouterr().err


def script(name, *arguments, stubs, **environment):
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PATH": f"{stubs}:/usr/bin:/bin"} | environment,
    )


@pytest.fixture
def stubs(tmp_path):
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name in ("ncu", "nsys"):
        copy = f'while [ "$1" != --log-file ]; do shift; done; cp "{SAMPLE}" "$2"' if name == "ncu" else ""
        (folder / name).write_text(f'#!/bin/bash\necho "$GPU_LAYERS_PROFILE_RANGES $*" >>"{folder}/calls"\n{copy}\n')
        (folder / name).chmod(0o755)
    return folder


def test_ncu_script(stubs, tmp_path):
    done = script("ncu.sh", "max_pool/forward", str(tmp_path / "out"), stubs=stubs, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    call = (stubs / "calls").read_text()
    assert "--clock-control none" in call
    assert "dram__bytes_read.sum,dram__bytes_write.sum" in call
    assert "-m profiling.one max_pool/forward" in call
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "max_pool-forward.ncu-raw.csv",
        "max_pool-forward.ncu.csv",
    ]
    assert "max_pool_forward<__nv_bfloat16" in done.stdout


def test_nsys_script(stubs):
    assert script("nsys.sh", "dropout", "report", stubs=stubs, PYTHON=sys.executable).returncode == 0
    assert script("nsys.sh", "report", "--", "python3", "train.py", stubs=stubs).returncode == 0
    profile, stats, other, _ = (stubs / "calls").read_text().splitlines()
    assert profile.startswith("1 profile --trace=cuda,nvtx")
    assert profile.endswith("-m profiling.one dropout --calls 10")
    assert stats.endswith("report.nsys-rep")
    assert other.endswith("--output=report python3 train.py")


@pytest.mark.parametrize("name", ["ncu.sh", "nsys.sh"])
def test_missing_tools_and_bad_usage(name, tmp_path):
    done = script(name, "relu", stubs=tmp_path)
    assert done.returncode == 2
    assert "was not found: it comes with the CUDA toolkit" in done.stderr
    done = script(name, stubs=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: profiling/{name}")


def test_the_headline_operations_are_one_run():
    cases = chosen("headline", "bfloat16", False)
    assert [case.operation for case in cases[::2]] == list(HEADLINE)
    assert {case.direction for case in cases} == {"forward", "backward"}
    assert all(case.operation.layouts[-1] for case in chosen("headline", "bfloat16", True))
    special = {name for columns in SPECIAL.values() for name in columns}
    assert set(metrics_of("headline")) == set(COMMON) | special
