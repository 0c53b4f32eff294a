"""The folder of a run belongs to one run at a time, and an earlier run is not lost by mistake."""

import signal

import pytest

from gpu_layers.cli import main
from tests.cli.commands import assert_one_line_error, gpu_layers, started
from tests.training.images import write_images

FILES = ("checkpoint.safetensors", "model.safetensors", "metrics.json", "curves.png")


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "images.npz")


def _arguments(data, out, *more):
    return ["train", "--device", "cpu", "--data", data, "--out", out, "--epochs", 2, *more]


def _run(data, out, *more):
    return main([str(word) for word in _arguments(data, out, *more)])


def _contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_an_earlier_run_is_not_lost_by_mistake(data, tmp_path):
    out = tmp_path / "run"
    assert _run(data, out) == 0
    (out / "notes.txt").write_text("mine")
    before = _contents(out)
    finished = gpu_layers(*_arguments(data, out, "--seed", 1))
    assert_one_line_error(
        finished, f"{out} holds {', '.join(FILES)} of an earlier run", "--resume", "--overwrite", "another --out"
    )
    assert finished.stdout == ""
    assert _contents(out) == before
    # It is told before the data are looked at.
    assert_one_line_error(gpu_layers(*_arguments("/nowhere.npz", out)), "--resume")


@pytest.mark.parametrize("name", FILES[1:])
def test_one_file_of_a_run_is_a_run(data, tmp_path, capsys, name):
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_bytes(b"of an earlier run")
    for choice in ([], ["--resume"]):
        assert _run(data, out, *choice) == 2
        error = capsys.readouterr().err
        assert f"{out} holds {name} of an earlier run but no checkpoint to continue from: train anew" in error
        assert "--resume" not in error
    assert _contents(out) == {name: b"of an earlier run"}
    assert _run(data, out, "--overwrite") == 0
    assert set(_contents(out)) == set(FILES)


def test_a_folder_with_other_things_is_free(data, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert _run(data, out) == 0
    assert set(_contents(out)) == {*FILES, "notes.txt"}


def test_overwriting(data, tmp_path):
    out = tmp_path / "run"
    assert _run(data, out) == 0
    (out / "notes.txt").write_text("mine")
    (out / "model.safetensors.0123.partial").write_bytes(b"left by a killed run")
    before = _contents(out)
    assert _run(data, out, "--seed", "1", "--overwrite") == 0
    after = _contents(out)
    assert set(after) == {*FILES, "notes.txt"}
    assert after["notes.txt"] == b"mine"
    assert all(after[name] != before[name] for name in FILES)
    assert _run(data, tmp_path / "alone", "--seed", "1") == 0
    assert after["model.safetensors"] == (tmp_path / "alone" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("choice", [[], ["--resume"], ["--overwrite"]])
def test_two_runs_at_once(data, tmp_path, choice):
    out = tmp_path / "run"
    with started(*_arguments(data, out, "--epochs", 100_000)) as first:
        for _ in range(3):
            assert first.stdout.readline()
        partial = out / "model.safetensors.0123.partial"  # as if the first one were writing
        partial.write_bytes(b"half")
        second = gpu_layers(*_arguments(data, out, *choice))
        # A run that has begun is one already; to go on with it or to replace it, wait.
        part = f"another run is using {out}: wait for its end" if choice else "continue it with --resume"
        assert_one_line_error(second, part)
        assert partial.exists()
        assert first.stdout.readline()
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=60)
    # A killed run holds nothing.
    assert _run(data, out, "--overwrite") == 0
    assert not partial.exists()


def test_the_lock_itself(data, tmp_path):
    """The other run may have begun after this one looked."""
    with started(*_arguments(data, tmp_path / "run", "--epochs", 100_000)) as first:
        assert first.stdout.readline()
        unseen = """
from gpu_layers.training.run_folder import RunFolder
RunFolder.check = lambda self, **choices: None
"""
        finished = gpu_layers(*_arguments(data, tmp_path / "run"), before=unseen)
        assert_one_line_error(finished, "another run is using")


def test_a_folder_that_cannot_be_written_to(data):
    # Nobody, root included, makes files there.
    assert_one_line_error(gpu_layers(*_arguments(data, "/proc")), "Permission denied: /proc")
