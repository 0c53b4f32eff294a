"""What a call costs the host: everything but the device."""

from profiling.devices import EmulatedDevice
from profiling.launches import NoLaunches, listed_launches
from profiling.operations import BATCH_NORM_INFERENCE, RELU
from profiling.overhead import measure_overhead, overhead_table


def test_every_operation_and_pass():
    entries = measure_overhead(EmulatedDevice(), calls=2, operations=[BATCH_NORM_INFERENCE, RELU])
    assert [(entry["op"], entry["direction"]) for entry in entries] == [
        ("batch_norm_inference", "forward"),
        ("relu", "forward"),
        ("relu", "backward"),
    ]
    assert all(0 < entry["ours_us"] < 1e5 for entry in entries)
    assert all(isinstance(entry["torch_us"], (float, str)) for entry in entries)


def test_the_table_gives_reasons():
    text = overhead_table([{"op": "relu", "direction": "forward", "ours_us": 4.25, "torch_us": "PyTorch finds no GPU"}])
    assert text.splitlines()[-1].split() == ["relu", "forward", "4.2", "-", "PyTorch", "finds", "no", "GPU"]


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
    assert launch.grid[0] * launch.block[0] * 4 * 2 >= x.size
    with use_executor(NoLaunches()):
        y, _ = gl.ops.relu_forward(x)
    assert y.shape == x.shape
