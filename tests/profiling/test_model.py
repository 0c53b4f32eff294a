"""The model of cost: bytes against counts by hand, launches, and what the machine code allows."""

import numpy as np
import pytest

from gpu_layers import reference
from gpu_layers.catalogue.activation import RELU
from gpu_layers.catalogue.batch_norm import BATCH_NORM_INFERENCE
from gpu_layers.catalogue.batch_norm_variants import GHOST_BATCH_NORM, PADDED_BATCH_NORM, SYNC_BATCH_NORM
from gpu_layers.catalogue.dropout import DROP_PATH, DROPOUT
from gpu_layers.catalogue.pooling import MAX_POOL
from profiling.cases import Case
from profiling.compiled_code import Resources, occupancy, resident_blocks
from profiling.devices import GPUS
from profiling.model import failed_gates, main, model, predict_case
from profiling.results import Run
from profiling.traffic import launches_of, listed_launches, modelled_bytes
from tests.inputs import assert_same_bits


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),  # 2,048 threads
        (64, 256, 0, 4),  # 65,536 registers / (64 x 256)
        (65, 256, 0, 3),  # registers come by 256 a warp: 72 a thread
        (32, 32, 0, 32),  # never more blocks than 32
        (32, 256, 100 * 1024, 2),  # 228 KiB / (100 + 1)
        (255, 1024, 0, 0),  # does not fit at all
    ],
)
def test_resident_blocks(registers, threads, shared, blocks):
    resources = Resources(registers, 0, 1024, 0)
    assert resident_blocks(resources, threads, shared) == blocks
    assert occupancy(resources, threads, shared) == blocks * threads / 2048


def test_launches_of_a_shape_that_is_too_large_to_be_run():
    (launch,) = launches_of(Case(RELU, "forward", (256, 64, 112, 112), "float32"))
    assert launch.kernel.name == "relu_forward<float>"
    n = 256 * 64 * 112 * 112
    assert launch.array_bytes == {"x": 4 * n, "y": 4 * n, "gradient_bits": n // 8}


def test_launches_of_a_backward_leave_out_those_before_it():
    launches = launches_of(Case(DROPOUT, "backward", (64, 1000), "float32"))
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("operation", "direction", "per_input"),
    [(DROPOUT, "forward", 8), (RELU, "backward", 8.125), (MAX_POOL, "forward", 5.25), (MAX_POOL, "backward", 5.25)],
)
def test_modelled_bytes(operation, direction, per_input):
    shape = (64, 256, 56, 56)
    case = Case(operation, direction, shape, "float32")
    moved, note = modelled_bytes(case, launches_of(case))
    assert note == ""
    assert sum(moved) == pytest.approx(per_input * np.prod(shape), rel=0.002)


def test_values_per_channel_are_not_scaled_with_the_batch():
    case = Case(BATCH_NORM_INFERENCE, "forward", (64, 256, 56, 56), "float32")
    moved, _ = modelled_bytes(case, launches_of(case))
    # x and y, and of each channel gamma, beta, mean and variance, and the five that are kept; an array may begin in the
    # middle of a sector.
    assert sum(moved) == pytest.approx(8 * 64 * 256 * 56 * 56 + 9 * 4 * 256, abs=4000)


def test_padding_is_not_read_but_written():
    pytest.importorskip("cupy")
    shape = (2, 64, 28, 28)
    row = model(Case(PADDED_BATCH_NORM, "backward", shape, "float32"))
    x = 4 * 2 * 64 * 28 * 28
    # The kernel reads dy and x where they are valid, and writes all of dx.
    assert row.model["bytes"] == pytest.approx(5 * x // 2, rel=0.01)
    assert row.floor_bytes == 5 * x // 2 + 6 * 4 * 64  # of each of 64 channels six numbers
    assert row.notes == []


def test_what_is_executed_does_not_depend_on_what_was_in_memory():
    """Parts of x that lie behind what is filled have numbers, too, and partial results are zeros."""
    case = Case(GHOST_BATCH_NORM, "forward", (12, 256, 56, 56), "float32", channels_last=True)
    groups, workspaces = [], []
    for launch in launches_of(case, filled=True):
        given = dict(zip([one.name for one in launch.kernel.parameters], launch.values, strict=True))
        groups += [given["x"]] if "x" in given else []
        workspaces += [given["partial_moments"]] if given.get("partial_moments") is not None else []
    assert len({group.ctypes.data for group in groups}) > 1
    assert len(workspaces) > 1
    for group in groups:
        assert 0.9 < group.reshape(-1)[:1000].std() < 1.1
    for workspace in workspaces:
        assert not workspace.any()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("filled", [False, True])
def test_launches_of_a_padded_batch_are_told_its_positions(direction, filled):
    """What is executed for the model does the work of these lengths, not of what was in memory."""
    case = Case(PADDED_BATCH_NORM, direction, (8, 16, 28, 28), "float32")
    own = np.array([(14 if sample % 2 else 28, 28) for sample in range(8)])
    told = [
        launch.values[[one.name for one in launch.kernel.parameters].index("valid")]
        for launch in launches_of(case, filled=filled)
        if "padded_" in launch.kernel.name
    ]
    assert told
    for words in told:
        assert_same_bits(words, reference.valid_words((8, 28, 28), own, None, None))


@pytest.mark.parametrize(
    ("operation", "direction", "per_input", "launches"),
    [
        (GHOST_BATCH_NORM, "forward", 8, 3),
        (GHOST_BATCH_NORM, "backward", 12, 4),
        (SYNC_BATCH_NORM, "forward", 12, 5),
        (SYNC_BATCH_NORM, "backward", 20, 4),
    ],
)
def test_modelled_bytes_of_the_variants_of_batch_norm(operation, direction, per_input, launches):
    case = Case(operation, direction, (64, 256, 56, 56), "float32")
    listed = launches_of(case)
    assert len(listed) == launches
    moved, note = modelled_bytes(case, listed)
    assert note == ""
    assert sum(moved) == pytest.approx(per_input * np.prod(case.shape), rel=0.002)


def test_where_smaller_shapes_take_other_kernels_the_note_says_so():
    case = Case(RELU, "forward", (8192, 4096), "float32")
    with listed_launches() as others:
        import gpu_layers as gl

        gl.ops.relu_forward(np.ones(100, np.float16))
    # Two arrays of 100 half values, and a bit for each.
    assert modelled_bytes(case, others) == ([413.0], "bytes not counted: smaller shapes take other kernels")


def test_what_is_dropped_together_is_scaled_by_the_masks_and_not_by_the_sizes():
    # Of 64 samples a half is kept; of the one that is counted, all of it.
    case = Case(DROP_PATH, "forward", (64, 256, 56, 56), "float32")
    moved, note = modelled_bytes(case, launches_of(case))
    assert note == ""
    assert sum(moved) == pytest.approx(case.floor_bytes, rel=0.01)


def test_gates():
    pytest.importorskip("cupy")
    case = Case(RELU, "forward", (32, 64, 28, 28), "bfloat16")
    prediction = predict_case(case)
    (blocks,) = failed_gates(case, case.floor_bytes, prediction)
    assert blocks.startswith("relu_forward<__nv_bfloat16>: 392 blocks, ")
    assert failed_gates(case, 2 * case.floor_bytes, prediction)[0] == "moves 2.00 x the floor"


def test_a_row():
    pytest.importorskip("cupy")
    case = Case(DROPOUT, "forward", (8192, 4096), "bfloat16")
    row = model(case, GPUS["H100"])
    assert row.timings == {}
    assert row.model["gpu"] == "H100"
    assert row.model["bytes"] == pytest.approx(case.floor_bytes, rel=0.01)
    assert row.model["failed_gates"] == []
    (launch,) = row.model["launches"]
    assert launch["kernel"] == "dropout_apply<__nv_bfloat16>"
    assert 16 <= launch["registers"] <= 64
    assert 0.5 <= launch["occupancy"] <= 1
    # Ten rounds of Philox, of two products and two exclusive sums each, serve four elements: 40 instructions for 16
    # bytes are the least, and an H100 copies a byte in the time of 11.
    assert 2.5 < row.model["instructions"] / case.floor_bytes < 11
    # The memory has to carry 134 MB at 3 TB/s.
    assert 1e-6 * row.model["microseconds"] >= case.floor_bytes / 3e12
    assert 0.7 < row.model["fraction"] <= 1


def test_the_largest_rows_and_those_that_are_measured(capsys):
    pytest.importorskip("cupy")
    assert main(["--largest", "--only", "^relu forward"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("relu")]
    assert [line.split()[2:4] for line in lines] == [["8192x4096", "bfloat16"], ["256x64x112x112", "bfloat16"]]


def test_the_command(tmp_path, capsys):
    pytest.importorskip("cupy")
    pytest.importorskip("matplotlib")
    arguments = ["--only", "^relu .* 8192x4096 bfloat16", "--json", str(tmp_path / "m.json")]
    assert main([*arguments, "--plot", str(tmp_path / "m.png")]) == 0
    assert capsys.readouterr().out.startswith("MODELLED for an H200, with no GPU")
    run = Run.load(tmp_path / "m.json")
    assert run.kind == "modelled"
    assert [row.direction for row in run.rows] == ["forward", "backward"]
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_bad_usage(capsys):
    assert main(["--only", "lstm"]) == 2
    assert "no case is named like 'lstm'" in capsys.readouterr().err
