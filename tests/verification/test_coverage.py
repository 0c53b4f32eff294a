"""Nothing public is left out: every operation is verified, its traffic counted, and it is in the benchmark."""

import contextlib
import inspect
import sys
from collections.abc import Iterator

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import ops
from gpu_layers.catalogue import OPERATIONS, batch_norm_variants
from gpu_layers.catalogue.inputs import NoLaunches
from gpu_layers.layers import batch_norm as batch_norm_layers
from gpu_layers.runtime import ranges
from gpu_layers.runtime.backend import use_backend, use_executor
from gpu_layers.verification import all_cases
from gpu_layers.verification.traffic import traffic_cases
from profiling.cases import InputMaker
from profiling.cases import all_cases as benchmark_cases
from profiling.devices import EmulatedDevice
from profiling.implementations import Ours
from profiling.small_run import kernels_of

#: What runs kernels, but for other names of the same function.
PASSES = {name for name in ops.__all__ if name.endswith(("_forward", "_backward", "_inference", "_moments", "_gather"))}
PASSES -= {"alpha_dropout_backward"}
#: How a layer is told what is valid of a padded batch.
PADDED = {"lengths", "mask"}
#: Passes of the same kernels as others that are counted and timed.
EVALUATED = {"batch_norm_inference_backward", "batch_norm_max_pool_inference", "batch_norm_max_pool_inference_backward"}


@pytest.fixture
def called(monkeypatch) -> Iterator[set[str]]:
    """Grows with the name of every operation that is called, and with how padded batches are told."""
    names: set[str] = set()
    codes = {inspect.unwrap(getattr(ops, name)).__code__: name for name in PASSES}

    def note(frame, event, argument):
        if event == "call" and frame.f_code in codes:
            names.add(codes[frame.f_code])

    right = batch_norm_layers.valid_positions

    def valid_positions(x, lengths, mask, channels_last):
        names.update({"lengths"} if lengths is not None else (), {"mask"} if mask is not None else ())
        return right(x, lengths, mask, channels_last)

    for module in (batch_norm_layers, batch_norm_variants):
        monkeypatch.setattr(module, "valid_positions", valid_positions)
    sys.setprofile(note)
    yield names
    sys.setprofile(None)


def test_every_operation_is_verified_in_every_dtype(called):
    cases = list(all_cases())
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        called.clear()
        for case in cases:
            if str(case.dtype) == dtype:
                kernels_of(case)
        assert (PASSES | PADDED) - called == set(), dtype


def test_the_traffic_of_every_operation_is_counted(called):
    counted: set[str] = set()
    for case in traffic_cases():
        if str(case.dtype) == "bfloat16":
            with use_backend("reference"):
                measured, floor = case.prepare()
            called.clear()
            with nothing_runs():
                measured()
            counted |= called
            assert floor > 0
    assert (PASSES - EVALUATED | {"lengths"}) - counted == set()


def test_every_operation_is_in_the_benchmark_and_in_the_model(called):
    device = EmulatedDevice()
    maker = InputMaker(device, block=2**12)
    for case in {str(one.toy()): one.toy() for one in benchmark_cases(OPERATIONS, ("float32",))}.values():
        inputs = maker.inputs(case)
        with nothing_runs():
            Ours(case, device).prepare(inputs)()
        assert case.floor_bytes > 0
    assert (PASSES - EVALUATED | {"lengths"}) - called == set()


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    with use_executor(NoLaunches()), np.errstate(all="ignore"):
        yield


LAYERS = [
    name
    for name in gl.__all__
    if isinstance(getattr(gl, name), type) and issubclass(getattr(gl, name), gl.Layer) and name != "Layer"
]


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_ranges_around_both_passes(name):
    ranges._switch_on(lambda event: None, lambda: None)
    try:
        layer = getattr(gl, name)
        assert hasattr(layer.forward, "without_range")
        assert hasattr(layer.backward, "without_range")
    finally:
        ranges._switch_off()
