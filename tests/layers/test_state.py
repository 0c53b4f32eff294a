"""States from elsewhere: other arrays, other dtypes, old checkpoints, parts; all or nothing."""

import io
from collections import OrderedDict

import numpy as np
import pytest
import torch

import gpu_layers as gl
from gpu_layers.training import SGD, Adam
from tests.inputs import BFLOAT16, DTYPES, assert_all_same_bits, assert_same_bits, normal, unchanged

NAMES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def network(dtype="float32"):
    return gl.Sequential(gl.Linear(3, 4, dtype=dtype, seed=1), gl.BatchNorm1d(4, dtype=dtype), gl.ReLU())


def filled(dtype="float32"):
    """A state of values that have more digits than half types, and a count."""
    made = network(dtype)
    state = {name: normal(value.shape, value.dtype, seed=9) for name, value in made.state_dict().items()}
    state["1.running_var"] = np.abs(state["1.running_var"]) + 1
    state["1.num_batches_tracked"] = np.array(12)
    return state


@pytest.mark.parametrize("own", ["float32", "float64"])
@pytest.mark.parametrize("given", [*DTYPES, np.dtype(">f4"), np.dtype("<f8"), np.dtype(np.longdouble)], ids=str)
def test_floats_of_any_dtype(own, given):
    state = {
        name: value.astype(given) if value.dtype.kind == "f" else value for name, value in filled("float64").items()
    }
    layer = network(own)
    with unchanged(*(value for value in state.values() if value.dtype.isnative)):
        assert layer.load_state_dict(state) == ([], [])
    for name, value in layer.state_dict().items():
        expected = state[name].astype(np.int64 if name.endswith("tracked") else own)
        assert_same_bits(value, expected, name)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_torch_tensors(dtype):
    state = {name: torch.from_numpy(np.asarray(value)) for name, value in filled().items()}
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    state["0.bias"].requires_grad_()
    # A view in other memory, and one whose sign is a flag.
    state["0.weight"] = state["0.weight"].t().contiguous().t()
    if dtype.itemsize > 1:
        state["1.bias"] = torch._neg_view(state["1.bias"])
    layer = network()
    layer.load_state_dict(state)
    for name, value in layer.state_dict().items():
        assert_same_bits(value, state[name].detach().double().resolve_neg().numpy().astype(value.dtype), name)


def test_a_tensor_without_values_is_refused_by_name():
    layer, state = network(), filled()
    before = layer.state_dict()
    for broken in (torch.empty(4, device="meta"), torch.ones(4).to_sparse(), torch.ones(4, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=r"1\.bias"):
            layer.load_state_dict(state | {"1.bias": broken})
    assert_all_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("count", [7, np.int32(7), np.uint8(7), 7.0, np.float16(7), torch.tensor(7), torch.tensor(7.0)])
def test_counts_in_any_number_type(count):
    layer = network()
    layer.load_state_dict(filled() | {"1.num_batches_tracked": count})
    assert_same_bits(layer[1].buffers["num_batches_tracked"], np.array(7))


@pytest.mark.parametrize("count", [7.5, np.nan, np.inf, np.uint64(2**63)])
def test_what_is_no_count_is_refused(count):
    layer = network()
    before = layer.state_dict()
    with pytest.raises(ValueError, match=r"1\.num_batches_tracked must be a whole number below 2\*\*63, got"):
        layer.load_state_dict(filled() | {"1.num_batches_tracked": count})
    assert_all_same_bits(layer.state_dict(), before)


def test_old_checkpoints_have_no_count():
    layer = gl.BatchNorm1d(3)
    layer(normal((4, 3), np.float32))
    state = {name: value for name, value in layer.state_dict().items() if name != "num_batches_tracked"}
    assert layer.load_state_dict(state) == ([], [])
    assert layer.buffers["num_batches_tracked"] == 0
    both = gl.Sequential(gl.BatchNorm1d(3), gl.BatchNorm1d(3))
    both(normal((4, 3), np.float32))
    state = both.state_dict()
    del state["0.num_batches_tracked"]
    both.load_state_dict(state)
    assert (both[0].buffers["num_batches_tracked"], both[1].buffers["num_batches_tracked"]) == (0, 1)


def test_a_part_of_a_state_counts_nothing_anew():
    layer = gl.BatchNorm1d(3)
    layer(normal((4, 3), np.float32))
    keys = layer.load_state_dict({"weight": np.zeros(3)}, strict=False)
    assert keys == (["bias", "running_mean", "running_var"], [])
    assert layer.buffers["num_batches_tracked"] == 1
    layer.load_state_dict({"running_mean": np.zeros(3)}, strict=False)
    assert layer.buffers["num_batches_tracked"] == 0


def test_missing_and_unexpected_keys_are_those_of_torch():
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    given = OrderedDict([("9.more", np.zeros(2)), ("1.bias", np.full(4, 3.0)), ("0.weights", np.zeros(1))])
    ours = network()
    before = ours.state_dict()
    keys = ours.load_state_dict(given, strict=False)
    expected = theirs.load_state_dict({name: torch.from_numpy(value) for name, value in given.items()}, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (expected.missing_keys, expected.unexpected_keys)
    assert tuple(keys) == (keys.missing_keys, keys.unexpected_keys)
    assert "missing_keys=['0.weight', '0.bias'" in repr(keys)
    for name, value in ours.state_dict().items():
        assert_same_bits(value, np.full(4, 3, np.float32) if name == "1.bias" else before[name], name)
    # What is there has to fit all the same.
    with pytest.raises(ValueError, match=r"size mismatch for 1\.bias"):
        ours.load_state_dict({"1.bias": np.zeros(5), "0.bias": np.zeros(4)}, strict=False)
    assert_same_bits(ours[0].parameters["bias"], before["0.bias"])


def test_all_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"mismatch for 0\.bias: .*\[5\].*\[4\]; size mismatch for 1\.bias"):
        network().load_state_dict(filled() | {"0.bias": np.zeros(5), "1.bias": np.zeros((4, 1))})


def test_the_layers_own_arrays_swapped():
    layer = gl.BatchNorm1d(3)
    for seed, name in enumerate(NAMES[:4]):
        {**layer.parameters, **layer.buffers}[name][...] = normal((3,), seed=seed)
    before = layer.state_dict()
    own = {**layer.parameters, **layer.buffers}
    swapped = {"weight": "running_mean", "running_mean": "bias", "bias": "weight"}
    layer.load_state_dict({**own, **{name: own[other] for name, other in swapped.items()}})
    for name in NAMES:
        assert_same_bits({**layer.parameters, **layer.buffers}[name], before[swapped.get(name, name)], name)
    # A view of the array itself, backwards.
    layer.load_state_dict(own | {"weight": own["weight"][::-1]})
    assert_same_bits(layer.parameters["weight"], before["running_mean"][::-1])


def test_read_only_values_and_read_only_layers():
    layer, state = network(), filled()
    for value in state.values():
        value.flags.writeable = False
    layer.load_state_dict(state)
    assert layer[0].parameters["bias"].flags.writeable
    before = layer.state_dict()
    layer[1].buffers["running_var"].flags.writeable = False
    with pytest.raises(ValueError, match=r"1\.running_var: the layer's own array is read-only"):
        layer.load_state_dict({name: value + 1 for name, value in state.items()})
    assert_all_same_bits(layer.state_dict(), before)


def test_archives_of_numpy():
    buffer, state = io.BytesIO(), filled()
    np.savez(buffer, **state)
    buffer.seek(0)
    layer = network()
    layer.load_state_dict(np.load(buffer))
    assert_all_same_bits(layer.state_dict(), state)
    assert layer.load_state_dict({**state, "1.num_batches_tracked": 3, "0.bias": [1.0, 2, 3, 4]}) == ([], [])
    assert layer[0].parameters["bias"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("state", [None, [], np.ones(3), "weight", 3])
def test_what_is_no_mapping(state):
    with pytest.raises(TypeError, match="Expected state_dict to be dict-like, got"):
        network().load_state_dict(state)


@pytest.mark.parametrize("kind", [lambda p: SGD(p, 0.1, momentum=0.9), lambda p: Adam(p, 0.1)], ids=["SGD", "Adam"])
@pytest.mark.parametrize(
    "convert", [lambda v: torch.from_numpy(v.copy()), lambda v: v.astype(np.float64)], ids=["torch", "float64"]
)
def test_an_optimizers_state_from_elsewhere(kind, convert):
    ones = [gl.Linear(3, 2, seed=1) for _ in range(2)]
    first, second = (kind(layer.parameters) for layer in ones)
    gradients = {"weight": normal((2, 3), np.float32), "bias": normal((2,), np.float32)}
    first.step(gradients)
    second.step({name: -value for name, value in gradients.items()})
    for name, value in ones[0].parameters.items():
        ones[1].parameters[name][...] = value
    before = second.state_dict()
    state = {name: convert(np.asarray(value)) for name, value in first.state_dict().items()}
    name = list(before)[-1]
    with pytest.raises(ValueError, match="state of another optimizer: size mismatch"):
        second.load_state_dict(state | {name: np.zeros(9)})
    assert all((value == before[name]).all() for name, value in second.state_dict().items())
    second.load_state_dict(state)
    first.step(gradients)
    second.step(gradients)
    assert_all_same_bits(ones[1].parameters, ones[0].parameters)


# --- running statistics begin anew ---

TRACKING = {
    "BatchNorm1d": lambda **options: gl.BatchNorm1d(3, **options),
    "GhostBatchNorm1d": lambda **options: gl.GhostBatchNorm1d(3, 2, **options),
    "SyncBatchNorm": lambda **options: gl.SyncBatchNorm(3, **options),
}
each_tracking = pytest.mark.parametrize("make", TRACKING.values(), ids=TRACKING)


@each_tracking
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_begin_anew_in_place(make, dtype):
    layer, fresh = make(dtype=dtype), make(dtype=dtype)
    layer(normal((5, 3), dtype))
    buffers = dict(layer.buffers)
    layer.reset_running_stats()
    for name, value in fresh.buffers.items():
        assert layer.buffers[name] is buffers[name]
        assert_same_bits(layer.buffers[name], value)


@each_tracking
def test_without_running_statistics_there_is_nothing_to_begin_anew(make):
    layer, fresh = make(track_running_stats=False), make(track_running_stats=False)
    layer.reset_running_stats()
    assert layer.buffers == {}
    fresh.load_state_dict(layer.state_dict())


@each_tracking
def test_tracking_that_is_switched_on_late(make):
    layer = make(track_running_stats=False, dtype="float64")
    layer.track_running_stats = True
    with pytest.raises(RuntimeError, match=r"has no running_mean: call reset_running_stats\(\) once it is set"):
        layer(normal((5, 3)))
    layer.reset_running_stats()
    layer(normal((5, 3)))
    assert layer.buffers["num_batches_tracked"] == 1
    assert layer.buffers["running_var"].dtype == np.float64


@each_tracking
def test_buffers_that_are_not_as_they_should_be_are_replaced(make):
    layer, fresh = make(), make()
    layer.buffers["running_mean"] = np.zeros(4, np.float32)
    layer.buffers["running_var"] = np.zeros(3, BFLOAT16)
    layer.reset_running_stats()
    assert_all_same_bits(layer.buffers, fresh.buffers)
