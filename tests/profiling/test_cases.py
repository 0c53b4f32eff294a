"""The rows: their bytes, their order, and what fits into memory."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.catalogue import OPERATIONS
from gpu_layers.catalogue.activation import RELU
from gpu_layers.catalogue.activation_dropout import ACTIVATION_DROPOUT
from gpu_layers.catalogue.batch_norm import BATCH_NORM
from gpu_layers.catalogue.batch_norm_variants import GHOST_BATCH_NORM, PADDED_BATCH_NORM, SYNC_BATCH_NORM
from gpu_layers.catalogue.dropout import CHANNEL_DROPOUT, DROP_PATH, DROPOUT
from gpu_layers.catalogue.pooling import AVG_POOL, MAX_POOL
from profiling.cases import Case, all_cases, selected

BIG = (64, 256, 56, 56)
N = 64 * 256 * 56 * 56


@pytest.mark.parametrize(
    ("operation", "direction", "dtype", "floor", "torch"),
    [
        # Bytes an input element, as counted by hand from what each algorithm reads and writes.
        (DROPOUT, "forward", "float32", 8, 9),
        (DROPOUT, "backward", "bfloat16", 4, 5),
        (RELU, "backward", "float32", 8.125, 12),
        (BATCH_NORM, "forward", "float32", 8, 12),
        (BATCH_NORM, "backward", "bfloat16", 6, 10),
        (MAX_POOL, "forward", "float32", 5.25, 7),
        (MAX_POOL, "backward", "bfloat16", 2.75, 4.5),
        (AVG_POOL, "forward", "float32", 5, 5),
        (ACTIVATION_DROPOUT, "forward", "float32", 8, 17),
        (ACTIVATION_DROPOUT, "backward", "bfloat16", 6, 11),
        (GHOST_BATCH_NORM, "forward", "float32", 8, 20),
        (GHOST_BATCH_NORM, "backward", "bfloat16", 6, 14),
        (SYNC_BATCH_NORM, "forward", "float32", 12, 12),
        (SYNC_BATCH_NORM, "backward", "bfloat16", 10, 10),
        # Of three quarters: 6 to gather, 9 to normalise, 6 to scatter, and 4 of zeros; of each of 256 channels of a
        # position 2 of a mask, and three times three numbers of 8 where it is valid. Backward two times.
        (PADDED_BATCH_NORM, "forward", "float32", 7, 25 + (2 + 3 * 3 * 8 * 0.75) / 256),
        (PADDED_BATCH_NORM, "backward", "bfloat16", 5, 15.5 + 2 * 3 * 8 * 0.75 / 256),
    ],
)
def test_bytes(operation, direction, dtype, floor, torch):
    case = Case(operation, direction, BIG, dtype)
    # Of each of 256 channels, in float32: what a forward keeps, mean, variance, deviation, gamma and beta, and the last
    # two as they are given; or four of those that are kept, and two gradients. Of three groups thrice. Of processes
    # that exchange sums, both twice.
    numbers = {
        BATCH_NORM: {"forward": 7, "backward": 6},
        GHOST_BATCH_NORM: {"forward": 21, "backward": 18},
        SYNC_BATCH_NORM: {"forward": 16, "backward": 12},
        PADDED_BATCH_NORM: {"forward": 7, "backward": 6},
    }.get(operation, {})
    assert case.floor_bytes == floor * N + 4 * 256 * numbers.get(direction, 0)
    # PyTorch's keep no copies of gamma and beta.
    theirs = {BATCH_NORM: {"forward": 5, "backward": 5}, SYNC_BATCH_NORM: {"forward": 9, "backward": 9}}
    of_channels = theirs.get(operation, {}).get(direction, 0)
    assert case.torch_bytes == pytest.approx(torch * N + 4 * 256 * of_channels, abs=4 * 256 * 8)


def test_nobody_moves_less_than_the_fewest_bytes():
    for case in all_cases(OPERATIONS, ("bfloat16", "float32")):
        # But for numbers of channels, which the counts of some compositions leave out; and for the bits that ReLU's
        # forward leaves to its backward, where PyTorch reads the output again; and for the copy of the indices, which
        # PyTorch's unpooling does not make.
        leaving = {"relu": 0.94, "max_unpool": 0.69} if case.direction == "forward" else {}
        least = leaving.get(case.operation.name, 0.97)
        assert case.torch_bytes >= least * case.floor_bytes, str(case)


def test_the_floor_of_what_is_dropped_together_is_that_of_the_mask():
    case = Case(DROP_PATH, "forward", (64, 256, 56, 56), "float32")
    assert case.floor_bytes == 3 * 4 * N // 2  # a half of the first 64 samples is kept
    kept = 4 * N * np.mean(gl.ops.dropout_mask(64 * 256, 0.5, 1, 2))
    assert Case(CHANNEL_DROPOUT, "backward", BIG, "float32").floor_bytes == pytest.approx(4 * N + kept)


def test_names_are_unique_and_say_everything():
    names = [str(case) for case in all_cases(OPERATIONS, ("bfloat16", "float32", "float16"))]
    assert len(set(names)) == len(names)
    assert "max_pool backward 64x256x56x56 float16 channels_last" in names


def test_the_most_telling_shapes_come_first():
    shapes = [case.shape for case in all_cases([RELU], ("float32",))]
    assert shapes[:2] == [(8192, 4096)] * 2
    quick = {case.shape for case in all_cases([MAX_POOL], ("float32",), quick=True)}
    assert quick == {BIG, (32, 64, 28, 28)}


def test_channels_last_is_for_images():
    assert not [c for c in all_cases(OPERATIONS, ("float32",)) if c.channels_last and len(c.shape) == 2]


def test_shapes_in_memory_order():
    case = Case(MAX_POOL, "forward", (2, 3, 8, 12), "float32", channels_last=True)
    assert case.input_shape == (2, 8, 12, 3)
    assert case.output_shape == (2, 4, 6, 3)


def test_too_little_memory_halves_the_batch_and_keeps_the_name():
    case = Case(RELU, "forward", BIG, "float32")
    needed = case.bytes_needed(2)
    fitting = case.fitting(needed // 3, 2)
    assert fitting.shape == (16, 256, 56, 56)
    assert fitting.asked == BIG
    assert str(fitting) == str(case)
    assert fitting.bytes_needed(2) <= needed // 3
    assert case.fitting(needed, 2) is case


def test_not_even_one_fits():
    with pytest.raises(ValueError, match=r"relu forward .*: a batch of one needs 0\.\d GiB"):
        Case(RELU, "forward", BIG, "float32").fitting(1000, 2)


def test_selection():
    cases = list(all_cases(OPERATIONS, ("float32",)))
    assert {case.operation for case in selected(cases, "^max_pool backward")} == {MAX_POOL}
    assert selected(cases, None) == cases
    with pytest.raises(ValueError, match=r"no case is named like 'lstm': the operations are dropout, channel_dropout"):
        selected(cases, "lstm")
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        selected(cases, "(")
