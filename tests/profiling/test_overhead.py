"""What a call costs the host: everything but the device."""

from contextlib import nullcontext

import pytest

from gpu_layers.catalogue.activation import RELU
from gpu_layers.catalogue.batch_norm import BATCH_NORM_INFERENCE
from gpu_layers.catalogue.inputs import NoLaunches
from profiling import overhead
from profiling.devices import EmulatedDevice
from profiling.overhead import measure_overhead, overhead_head, overhead_line, python_calls
from profiling.results import Run
from profiling.traffic import listed_launches
from tests.profiling.fake_device import FakeTimer


def test_every_operation_and_pass():
    entries = measure_overhead(EmulatedDevice(), calls=2, operations=[BATCH_NORM_INFERENCE, RELU])
    assert [(entry["op"], entry["direction"]) for entry in entries] == [
        ("batch_norm_inference", "forward"),
        ("relu", "forward"),
        ("relu", "backward"),
    ]
    for entry in entries:
        assert all(0 < entry[f"{name}_us"] < 1e5 for name in ("ours", "torch", "add"))
        assert all(0 < entry[f"of_{name}"] < 1e5 for name in ("add", "torch"))


def test_ratios_are_of_neighbouring_turns(monkeypatch):
    """The host was slower for a while: in the second turns, and in half of the third."""
    turns = {"ours": [2.0, 4.0, 4.0], "torch": [4.0, 8.0, 8.0], "add": [1.0, 2.0, 1.0]}
    monkeypatch.setattr(overhead, "_seconds_of_turns", lambda *_: turns)
    (entry, _) = measure_overhead(EmulatedDevice(), calls=2, operations=[RELU])
    assert (entry["ours_us"], entry["torch_us"], entry["add_us"]) == (2e6, 4e6, 1e6)
    assert (entry["of_add"], entry["of_torch"]) == (2, 0.5)


def test_layers_are_measured_against_modules():
    entries = measure_overhead(EmulatedDevice(), calls=1, operations=overhead.layer_operations(EmulatedDevice()))
    assert [entry["op"] for entry in entries[::2]] == ["layer Dropout", "layer BatchNorm2d", "layer MaxPool2d"]
    assert all(isinstance(entry[name], float) for entry in entries for name in ("ours_us", "torch_us", "of_torch"))


class Clock(FakeTimer):
    """Host work alone: the device is never waited for."""

    def synchronize(self):
        pass


def test_the_fastest_turn_of_each_counts_and_turns_alternate():
    device = EmulatedDevice()
    device.timer = Clock()
    order = []

    def subject(name, seconds):
        def call():
            order.append(name)
            # Twice as slow but for one call in a hundred and its five followers.
            device.timer.host += seconds * (1 if 100 <= order.count(name) < 106 else 2)

        return nullcontext, call

    turns = overhead._seconds_of_turns({"a": subject("a", 3.0), "b": subject("b", 1e-6)}, device, most_calls=6)
    found = {name: min(seconds) for name, seconds in turns.items()}
    # Slow calls make turns of five, and one turn falls within the fast six; a turn of six of the others may not.
    assert found["a"] == 3.0
    assert 1e-6 < found["b"] < 2e-6
    assert order[:10] == ["a"] * 5 + ["b"] * 5
    assert order[10:21] == ["a"] * 5 + ["b"] * 6
    assert order[21:32] == order[10:21]


def test_calls_of_python_functions_are_counted():
    def inner():
        return len([])  # which is none of Python's

    def outer():
        inner()
        inner()

    assert python_calls(outer) == 3
    assert python_calls(outer) == 3
    entry = measure_overhead(EmulatedDevice(), calls=1, operations=[RELU])[0]
    again = measure_overhead(EmulatedDevice(), calls=3, operations=[RELU])[0]
    assert 1 < entry["python_calls"] == again["python_calls"]


def test_the_table_gives_reasons():
    entry = {"op": "relu", "direction": "forward", "ours_us": 4.25, "torch_us": "PyTorch finds no GPU", "of_torch": "-"}
    assert overhead_head(entry).split() == ["operation", "ours_us", "torch_us", "of_torch"]
    assert overhead_line(entry).split() == ["relu", "forward", "4.25", "-", "-", "PyTorch", "finds", "no", "GPU"]


def test_what_is_measured_is_written_at_once(tmp_path, monkeypatch):
    path = tmp_path / "overhead.json"

    def ended(case, *arguments):
        if case.direction == "backward":
            raise KeyboardInterrupt
        return {"op": case.operation.name, "direction": case.direction, "ours_us": 1.0}

    monkeypatch.setattr(overhead, "_entry", ended)
    with pytest.raises(KeyboardInterrupt):
        overhead.main(["--no-gpu", "--every", "--only", "^relu$", "--json", str(path)])
    assert Run.load(path).overhead == [{"op": "relu", "direction": "forward", "ours_us": 1.0}]


def test_the_command_writes_a_run(tmp_path, capsys):
    path = tmp_path / "overhead.json"
    arguments = ["--no-gpu", "--every", "--only", "^(relu|layer Dropout)$", "--calls", "1", "--json", str(path)]
    assert overhead.main(arguments) == 0
    run = Run.load(path)
    assert run.kind == "emulated"
    assert [entry["op"] for entry in run.overhead] == ["relu", "relu", "layer Dropout", "layer Dropout"]
    assert "no GPU, launches that do nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lstm"], "no operation is named like 'lstm'"),
        (["--only", "("], "is not a regular expression"),
        (["--calls", "0"], "--calls must be at least 1, got 0"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    assert overhead.main(["--no-gpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_launches_are_listed_and_not_executed():
    import numpy as np

    import gpu_layers as gl
    from gpu_layers.runtime.backend import use_executor

    x = np.ones((4, 8, 16, 16), np.float32)
    with listed_launches() as launches:
        gl.ops.relu_forward(x)
    (launch,) = launches
    assert launch.kernel.name == "relu_forward<float>"
    assert launch.block == (256, 1, 1)
    # A thread has four vectors of four.
    assert launch.grid[0] * launch.block[0] * 4 * 4 == x.size
    with use_executor(NoLaunches()):
        y, _ = gl.ops.relu_forward(x)
    assert y.shape == x.shape
