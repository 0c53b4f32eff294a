"""Killed at any moment and started again: exactly the weights of a run that was never killed."""

import json
import os
import resource
import signal
from dataclasses import replace

import pytest

from gpu_layers.cli import main
from gpu_layers.training import Settings, Trainer, load_npz
from gpu_layers.training.checkpoint import load_arrays
from gpu_layers.training.trainer import DEFAULT_LR
from tests.cli.commands import assert_one_line_error, gpu_layers, started
from tests.training.images import write_images

OPTIONS = ["--epochs", "5", "--batch-size", "8", "--p", "0.3", "--seed", "7"]
CHECKPOINT, MODEL = "checkpoint.safetensors", "model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "images.npz", train=41)


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """The folder of a run that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert main(["train", "--device", "cpu", "--data", str(data), "--out", str(out), *OPTIONS]) == 0
    return out


def _arguments(data, out, *more):
    return ["train", "--device", "cpu", "--data", str(data), "--out", str(out), *OPTIONS, *more]


def _assert_resumes_to(whole_run, data, out):
    assert main(_arguments(data, out, "--resume")) == 0
    assert (out / MODEL).read_bytes() == (whole_run / MODEL).read_bytes()
    # Seconds aside, the history is the same too.
    histories = [json.loads((folder / "metrics.json").read_text())["epochs"] for folder in (whole_run, out)]
    for first, second in zip(*histories, strict=True):
        assert {k: v for k, v in first.items() if "second" not in k} == {
            k: v for k, v in second.items() if "second" not in k
        }
    assert sorted(os.listdir(out)) == sorted(os.listdir(whole_run)), "nothing half written is left"


@pytest.mark.parametrize("lines", [1, 2, 4])
def test_killed_between_lines(data, whole_run, tmp_path, lines):
    with started(*_arguments(data, tmp_path)) as process:
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    _assert_resumes_to(whole_run, data, tmp_path)


# The process kills itself at the n-th time that a function of the operating system is called. Each file is written
# with fsync, replace, fsync of the folder; files in order: six checkpoints, model, metrics, curves.
_KILL = """
import os, signal
original, calls = os.{function}, 0
def killing(*arguments, **options):
    global calls
    calls += 1
    if calls == {number} and {after}:
        original(*arguments, **options)
    if calls == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
os.{function} = killing
"""


@pytest.mark.parametrize(
    ("function", "number", "after"),
    [
        ("fsync", 1, False),  # the first checkpoint is written, but has no name yet
        ("replace", 1, True),  # there is one, of no epoch
        ("fsync", 5, False),  # in the middle of the third checkpoint
        ("replace", 3, False),
        ("replace", 3, True),
        ("replace", 6, True),  # after the last epoch, before any output
        ("replace", 7, True),  # model written, metrics not
        ("fsync", 17, False),  # in the middle of the curves
    ],
)
def test_killed_while_writing(data, whole_run, tmp_path, function, number, after):
    killed = gpu_layers(*_arguments(data, tmp_path), before=_KILL.format(function=function, number=number, after=after))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "curves.png").exists()
    _assert_resumes_to(whole_run, data, tmp_path)


def test_killed_twice(data, whole_run, tmp_path):
    for number, more in ((3, []), (2, ["--resume"])):
        before = _KILL.format(function="replace", number=number, after=True)
        assert gpu_layers(*_arguments(data, tmp_path, *more), before=before).returncode == -signal.SIGKILL
    _assert_resumes_to(whole_run, data, tmp_path)


def test_resuming_a_finished_run_changes_nothing(data, whole_run, tmp_path):
    assert main(_arguments(data, tmp_path)) == 0
    for name in ("metrics.json", "curves.png", MODEL):
        (tmp_path / name).unlink()
    _assert_resumes_to(whole_run, data, tmp_path)


def test_nothing_to_resume(data, whole_run, tmp_path, capsys):
    _assert_resumes_to(whole_run, data, tmp_path / "new")
    assert "no checkpoint in" in capsys.readouterr().out


def test_other_settings(data, whole_run, capsys):
    before = (whole_run / CHECKPOINT).read_bytes()
    status = main(_arguments(data, whole_run, "--resume", "--p", "0.2", "--lr", "0.5"))
    errors = capsys.readouterr().err.splitlines()
    assert (status, len(errors)) == (2, 1)
    assert "made with p 0.3 instead of 0.2, lr 0.01 instead of 0.5" in errors[0]
    assert (whole_run / CHECKPOINT).read_bytes() == before


def _trained_in_two_plans(data, first, second, optimizer="adam"):
    """The weights of a run that was to have some epochs, and then others."""
    dataset = load_npz(data)
    settings = Settings("cpu", "float32", 7, first, 8, 0.3, "after", optimizer, DEFAULT_LR[optimizer])
    one = Trainer(settings, dataset)
    while not one.finished:
        one.train_epoch()
    other = Trainer(replace(settings, epochs=second), dataset)
    assert other.restore(*one.state()) == first
    while not other.finished:
        other.train_epoch()
    return other


def test_more_epochs_continue(data, tmp_path, capsys):
    """At the learning rate of the longer run: half a cosine over eight epochs, from the sixth of them on."""
    assert main(_arguments(data, tmp_path)) == 0
    old = (tmp_path / MODEL).read_bytes()
    assert main(_arguments(data, tmp_path, "--resume", "--epochs", "8")) == 0
    printed = capsys.readouterr().out
    assert (
        "continuing after epoch 5 of 8 (planned were 5: from here on the learning rate falls to 0 in epoch 8)"
        in printed
    )
    assert "test accuracy" in printed
    assert (tmp_path / MODEL).read_bytes() != old
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [entry["epoch"] for entry in metrics["epochs"]] == list(range(1, 9))
    assert metrics["settings"]["epochs"] == 8
    weights, _ = load_arrays(tmp_path / MODEL, "model")
    expected = _trained_in_two_plans(data, 5, 8).weights()
    assert all(weights[name].tobytes() == value.tobytes() for name, value in expected.items())


def test_fewer_epochs_than_are_done(data, whole_run, capsys):
    status = main(_arguments(data, whole_run, "--resume", "--epochs", "4"))
    (error,) = capsys.readouterr().err.splitlines()
    assert status == 2
    assert "the checkpoint is in or after epoch 5, beyond the 4 of this run" in error


# The process is asked to end while it works on a batch: 41 images, eight at a time, are five batches an epoch.
_ASK = """
import os, signal
from gpu_layers.training.trainer import Trainer
step, calls = Trainer._step, 0
def asking(self, chosen):
    global calls
    calls += 1
    if calls in {numbers}:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, chosen)
Trainer._step = asking
"""


@pytest.mark.parametrize(
    ("number", "position"),
    [
        (1, "epoch 0 and 1 batches of the next,"),
        (8, "epoch 1 and 3 batches of the next,"),
        (10, "epoch 2"),  # the last batch of an epoch: the epoch ends as always
        (24, "epoch 4 and 4 batches of the next,"),
    ],
)
def test_asked_to_end(data, whole_run, tmp_path, number, position):
    finished = gpu_layers(*_arguments(data, tmp_path), before=_ASK.format(numbers=(number,)))
    assert_one_line_error(
        finished,
        f"terminated after {position} of 5: {tmp_path / CHECKPOINT} is written, --resume continues",
        status=143,
    )
    assert sorted(os.listdir(tmp_path)) == [".lock", CHECKPOINT]
    _assert_resumes_to(whole_run, data, tmp_path)


def test_asked_to_end_in_the_last_batch(data, whole_run, tmp_path):
    """There is nothing left to continue: the run ends as it would have."""
    assert gpu_layers(*_arguments(data, tmp_path), before=_ASK.format(numbers=(25,))).returncode == 0
    assert (tmp_path / MODEL).read_bytes() == (whole_run / MODEL).read_bytes()


def test_asked_twice(data, whole_run, tmp_path):
    """Whoever cannot wait for the batch asks again."""
    twice = _ASK.replace("os.kill(os.getpid(), signal.SIGTERM)", "[os.kill(os.getpid(), signal.SIGTERM) for _ in 'ab']")
    finished = gpu_layers(*_arguments(data, tmp_path), before=twice.format(numbers=(8,)))
    assert finished.returncode == -signal.SIGTERM
    _assert_resumes_to(whole_run, data, tmp_path)


def test_asked_to_end_and_resumed_with_more_epochs(data, tmp_path):
    assert gpu_layers(*_arguments(data, tmp_path), before=_ASK.format(numbers=(8,))).returncode == 143
    assert main(_arguments(data, tmp_path, "--resume", "--epochs", "6")) == 0
    epochs = json.loads((tmp_path / "metrics.json").read_text())["epochs"]
    assert [entry["epoch"] for entry in epochs] == list(range(1, 7))


def test_a_process_that_ignores_sigterm_goes_on_ignoring_it(data, whole_run, tmp_path):
    before = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + _ASK.format(numbers=(8,))
    assert gpu_layers(*_arguments(data, tmp_path), before=before).returncode == 0
    assert (tmp_path / MODEL).read_bytes() == (whole_run / MODEL).read_bytes()


# Files of the new run in the order of their names: a checkpoint, five more, model, metrics, curves.
@pytest.mark.parametrize(
    ("number", "after", "replaced"),
    [
        (1, False, set()),
        (1, True, {CHECKPOINT}),
        (3, True, {CHECKPOINT}),
        (7, True, {CHECKPOINT, MODEL}),
        (9, False, {CHECKPOINT, MODEL, "metrics.json"}),
    ],
)
def test_a_new_run_killed_in_the_folder_of_an_old_one(data, whole_run, tmp_path, number, after, replaced):
    """Nothing of the old run goes before its successor is there, and what is resumed is the new one."""
    old = ["train", "--device", "cpu", "--data", str(data), "--out", str(tmp_path), "--epochs", "1", "--seed", "3"]
    assert main(old) == 0
    names = (CHECKPOINT, MODEL, "metrics.json", "curves.png")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    kill = _KILL.format(function="replace", number=number, after=after)
    assert gpu_layers(*_arguments(data, tmp_path, "--overwrite"), before=kill).returncode == -signal.SIGKILL
    assert {name for name in names if (tmp_path / name).read_bytes() != before[name]} == replaced
    if number == 1 and not after:
        assert main(_arguments(data, tmp_path, "--resume")) == 2, "the old run is still there"
        assert main(_arguments(data, tmp_path, "--overwrite")) == 0
    _assert_resumes_to(whole_run, data, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "model"])
def test_bad_checkpoint(data, whole_run, tmp_path, capsys, damage):
    content = (whole_run / CHECKPOINT).read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1
    bad = {
        "truncated": content[:-100],
        "flipped": bytes(flipped),
        "empty": b"",
        "foreign": b"PK\x03\x04" + bytes(100),
        "model": (whole_run / MODEL).read_bytes(),
    }[damage]
    (tmp_path / CHECKPOINT).write_bytes(bad)
    status = main(_arguments(data, tmp_path, "--resume"))
    errors = capsys.readouterr().err.splitlines()
    assert (status, len(errors)) == (2, 1)
    assert f"cannot resume from {tmp_path / CHECKPOINT}" in errors[0]
    assert (tmp_path / CHECKPOINT).read_bytes() == bad, "left as it was"


def test_disk_full_at_the_third_checkpoint(data, whole_run, tmp_path):
    full = """
import os
original, calls = os.fsync, 0
def fsync(handle):
    global calls
    calls += 1
    if calls == 5:
        raise OSError(28, "No space left on device")
    return original(handle)
os.fsync = fsync
"""
    finished = gpu_layers(*_arguments(data, tmp_path), before=full)
    assert_one_line_error(finished, "No space left on device")
    assert sorted(os.listdir(tmp_path)) == [".lock", CHECKPOINT]
    _assert_resumes_to(whole_run, data, tmp_path)


def test_no_room_for_a_file_of_that_size(data, whole_run, tmp_path):
    before = (whole_run / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(before)

    def limit():
        # The system itself then refuses the write, halfway through the file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)

    finished = gpu_layers(*_arguments(data, tmp_path, "--overwrite"), preexec_fn=limit)
    assert_one_line_error(finished, "File too large")
    assert sorted(os.listdir(tmp_path)) == [".lock", CHECKPOINT]
    assert (tmp_path / CHECKPOINT).read_bytes() == before
