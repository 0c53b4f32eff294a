"""Ranges for profilers: named by layer and pass, and gone without a trace when off."""

import subprocess
import sys

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.layers.base import Layer
from gpu_layers.runtime import ranges


@pytest.fixture
def events():
    seen = []
    ranges._switch_on(lambda name: seen.append(f"begin {name}"), lambda: seen.append("end"))
    yield seen
    ranges._switch_off()


def test_named_by_layer_and_pass(events):
    layer = gl.ReLU()
    layer.backward(layer(np.ones((2, 3), np.float32)))
    assert events == ["begin ReLU.forward", "end", "begin ReLU.backward", "end"]


def test_the_inherited_method_has_the_name_of_the_layer(events):
    gl.BatchNorm2d(3)(np.ones((2, 3, 4, 4), np.float32))
    assert events == ["begin BatchNorm2d.forward", "end"]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: gl.GhostBatchNorm1d(3, 2), "GhostBatchNorm1d"),
        (lambda: gl.SyncBatchNorm(3), "SyncBatchNorm"),
        (lambda: gl.BatchNorm1d(3), "BatchNorm1d"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"lengths": [4, 1, 3]}, {"mask": np.ones((3, 4), bool)}], ids=str)
def test_the_variants_of_batch_norm_have_one_range_a_pass(events, make, name, options):
    layer, x = make(), np.ones((3, 3, 4), np.float32)
    layer(x, **options)
    layer.backward(x)
    assert events == [f"begin {name}.forward", "end", f"begin {name}.backward", "end"]


def test_a_range_ends_when_the_layer_raises(events):
    with pytest.raises(RuntimeError):
        gl.ReLU().backward(np.ones(3, np.float32))
    assert events == ["begin ReLU.backward", "end"]


def test_a_class_that_is_defined_later(events):
    class Twice(Layer):
        def forward(self, x):
            return 2 * x

    assert Twice()(3) == 6
    assert events == ["begin Twice.forward", "end"]


def test_off_leaves_nothing_behind():
    before = gl.ReLU.__dict__["forward"]
    ranges._switch_on(lambda name: None, lambda: None)
    assert gl.ReLU.__dict__["forward"] is not before
    assert gl.ReLU.forward.__doc__ == before.__doc__
    ranges._switch_on(lambda name: None, lambda: None)  # twice is once
    gl.profile_ranges(False)
    assert gl.ReLU.__dict__["forward"] is before


def test_cupys_ranges():
    nvtx = pytest.importorskip("cupy").cuda.nvtx
    if not nvtx.available:
        pytest.skip("this CuPy has no NVTX")
    gl.profile_ranges(True)
    try:
        assert gl.ReLU()(np.array([-1.0, 2.0])).tolist() == [0.0, 2.0]
    finally:
        gl.profile_ranges(False)


def test_the_environment_variable():
    pytest.importorskip("cupy")
    code = "import gpu_layers as gl; print(hasattr(gl.ReLU.forward, 'without_range'))"
    for value, expected in (("1", "True"), ("0", "False")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(value), check=True
        )
        assert done.stdout.strip() == expected


def _environment(value):
    import os

    return os.environ | {"GPU_LAYERS_PROFILE_RANGES": value, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
