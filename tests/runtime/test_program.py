"""Programs: recorded once for each signature, run with the arrays and numbers of each call."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.kernels import arrays, valid_positions
from gpu_layers.runtime.arrays import NumpyArrays, kind_of, register_kind
from gpu_layers.runtime.kernel import all_kernels
from gpu_layers.runtime.launch import launch
from gpu_layers.runtime.limits import force_limits
from gpu_layers.runtime.program import Launcher
from gpu_layers.runtime.steps import Allocate, Compute, CooperativeLaunchRefusedError, Deliver, Launch, Views
from tests.inputs import LAYOUTS, assert_same_bits, normal

misaligned = LAYOUTS["off_by_a_byte"]

RELU = {kernel.name: kernel for kernel in all_kernels() if kernel.name.startswith("relu_forward")}
X = normal((3, 5), np.float32)


def bits_of(x):
    """Room for what relu keeps: one bit an element."""
    return arrays.empty((-(-x.size // 8),), np.uint8, x)


def recorded_relu():
    """relu as a launcher, and the list of what it was recorded for."""
    calls = []

    @Launcher
    def relu(operands, numbers, *arguments):
        calls.append(arguments)
        x, out = operands
        x = arrays.ready(x)
        y = arrays.destination(out, x)
        if y.size:
            launch(RELU[f"relu_forward<{arrays.element_type(x)}>"], 1, 256, (x, y, bits_of(x), x.size))
        return arrays.delivered(y, out)

    return relu, calls


@pytest.fixture(autouse=True)
def emulated():
    with gl.use_backend("emulated"):
        yield


def test_a_signature_is_recorded_once():
    relu, calls = recorded_relu()
    for seed in range(3):
        x = normal((3, 5), np.float32, seed)
        assert_same_bits(relu((x, None)), np.maximum(x, 0))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "other",
    [normal((5, 3), np.float32), X.astype(np.float64), X.T, misaligned(X), normal((6, 5), np.float32)[::2]],
    ids=["shape", "dtype", "strides", "alignment", "gaps"],
)
def test_another_signature_is_recorded_anew(other):
    relu, calls = recorded_relu()
    for x in (X, other, X, other):
        assert_same_bits(relu((x, None)), np.ascontiguousarray(np.maximum(x, 0)))
    assert len(calls) == 2


def test_arguments_and_limits_are_part_of_the_signature():
    relu, calls = recorded_relu()
    relu((X, None), (1,))
    relu((X, None), (2,))
    relu((X, None), (1,))
    assert calls == [(1,), (2,)]
    with force_limits(max_blocks=1):
        relu((X, None), (1,))
    assert len(calls) == 3


@pytest.mark.parametrize("make", [np.empty, lambda *a: misaligned(np.empty(*a)), lambda s, d: np.empty(s[::-1], d).T])
def test_results_are_written_where_the_caller_says(make):
    relu, _ = recorded_relu()
    out = make(X.shape, np.float32)
    assert relu((X, out)) is out
    assert_same_bits(np.ascontiguousarray(out), np.maximum(X, 0))


def test_a_read_only_result_is_refused_though_a_writeable_one_was_recorded():
    relu, _ = recorded_relu()
    out = np.zeros_like(X)
    relu((X, out))
    frozen = out.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"is written to, but the array is read-only"):
        relu((X, frozen))


def test_the_oldest_programs_go_first(monkeypatch):
    monkeypatch.setattr(Launcher, "MOST", 2)
    relu, calls = recorded_relu()
    for argument in (1, 2, 3, 2, 3, 1):
        relu((X, None), (argument,))
    assert calls == [(1,), (2,), (3,), (1,)]


def test_a_result_has_the_shape_in_which_it_is_returned():
    @Launcher
    def relu(operands, numbers):
        (x,) = operands
        y = arrays.empty((1, *x.shape), x.dtype, x)
        launch(RELU["relu_forward<float>"], 1, 256, (x, y, bits_of(x), x.size))
        with pytest.raises(ValueError, match="has no view of shape"):
            y.reshape(2, 7)
        return y.reshape(*x.shape), None

    y, nothing = relu((X,))
    assert nothing is None
    assert_same_bits(y, np.maximum(X, 0))


def test_a_tuple_of_one_result_is_a_tuple():
    @Launcher
    def relu(operands, numbers):
        (x,) = operands
        y = arrays.empty(x.shape, x.dtype, x)
        launch(RELU["relu_forward<float>"], 1, 256, (x, y, bits_of(x), x.size))
        return (y,)

    (y,) = relu((X,))
    assert_same_bits(y, np.maximum(X, 0))


def test_views_of_operands():
    """Of memory that kernels cannot use, and of what must not be written to."""

    @Launcher
    def look(operands, numbers):
        frozen, strided = operands
        for view in (frozen.reshape(5, 3), frozen.as_bytes(), frozen.as_bytes().reshape(4, 15), *rows_of(frozen)):
            assert not view.is_writeable
        assert [row.is_ready for row in rows_of(frozen)] == [True, False, False]
        assert all(row.is_ready for row in rows_of(frozen.program.allocate((2, 4), np.float32)))
        assert frozen.as_bytes().reshape(4, 15).of_bytes
        assert not frozen.reshape(5, 3).of_bytes
        with pytest.raises(ValueError, match="has no view of shape"):
            strided.reshape(15)
        with pytest.raises(ValueError, match="not contiguous has no parts"):
            strided.program.split(strided, (0, 5))

    def rows_of(operand):
        return operand.program.rows(operand)

    frozen = X.copy()
    frozen.flags.writeable = False
    assert look((frozen, X.T)) is None


def test_steps_of_every_kind():
    programs = []

    @Launcher
    def through_rows(operands, numbers):
        x, out = operands
        programs.append(x.program)
        x = arrays.ready(x)
        both = x.program.allocate((2, 16), np.float32, zeroed=True)
        first, second = x.program.rows(both)
        launch(RELU["relu_forward<float>"], 1, 256, (x, second, bits_of(x), 16))
        return arrays.delivered(both, out), first

    x, out = normal((2, 8), np.float32).T, np.full((16, 2), 7, np.float32).T
    both, first = through_rows((x, out))
    assert both is out
    assert_same_bits(np.ascontiguousarray(out[1]), np.maximum(x, 0).reshape(-1))
    assert not out[0].any()
    assert not first.any()
    assert [type(step) for step in programs[0].steps] == [Compute, Allocate, Views, Allocate, Launch, Deliver]


def test_parts_of_arrays():
    """Kernels write into parts of a result where their addresses suit them; others are copied there."""

    @Launcher
    def by_parts(operands, numbers):
        x = operands[0]
        y = arrays.empty(x.shape, x.dtype, x)
        for own, place in zip(x.program.split(x, (0, 1, 3)), x.program.split(y, (0, 1, 3)), strict=True):
            own, target = arrays.ready(own), arrays.destination(place, place)
            launch(RELU["relu_forward<float>"], 1, 256, (own, target, bits_of(own), own.size))
            arrays.delivered(target, place)
        return y, x.program.split(y, (1, 3))[0]

    y, last = by_parts((X,))
    assert_same_bits(y, np.maximum(X, 0))
    assert_same_bits(last.copy(), np.maximum(X[1:], 0))
    assert np.shares_memory(y, last)


def test_numbers_of_a_call():
    kernel = next(one for one in all_kernels() if one.name == "advance_rng_state<unsigned long long>")

    @Launcher
    def advance(operands, numbers):
        rng_state, taken = operands
        launch(kernel, 1, 1, (rng_state, rng_state, taken))
        return taken

    rng_state = np.array([5, 2**64 - 1, 6], np.uint64)
    taken = advance((rng_state, np.empty(3, np.uint64)), (), ())
    assert (taken.tolist(), rng_state.tolist()) == ([5, 2**64 - 1, 6], [5, 0, 6])
    x = np.ones(64, np.float32)
    for seed, offset in ((3, 4), (2**64 - 1, 2**64 - 1), (0, 2**63)):
        y, _ = gl.ops.dropout_forward(x, 0.5, seed, offset)
        np.testing.assert_array_equal(y != 0, gl.ops.dropout_mask(64, 0.5, seed, offset))


class Refusing(NumpyArrays):
    """Arrays on which the first program with a cooperative launch is refused."""

    refused = False

    def runner(self, program):
        run = super().runner(program)

        def run_or_refuse(arrays, *others):
            if any(isinstance(step, Launch) and step.cooperative for step in program.steps):
                Refusing.refused = True
                raise CooperativeLaunchRefusedError("kernel")
            return run(arrays, *others)

        return run_or_refuse


def test_a_refused_launch_is_recorded_without_it():
    calls = []

    @Launcher
    def relu(operands, numbers):
        calls.append(Refusing.refused)
        x = operands[0]
        y = arrays.empty(x.shape, x.dtype, x)
        launch(RELU["relu_forward<float>"], 1, 256, (x, y, bits_of(x), x.size), cooperative=not Refusing.refused)
        return y

    ordinary = kind_of(X)
    register_kind(np.ndarray, Refusing())
    try:
        for _ in range(2):
            assert_same_bits(relu((X,)), np.maximum(X, 0))
    finally:
        register_kind(np.ndarray, ordinary)
    assert calls == [False, True]


def test_what_is_no_array():
    with pytest.raises(TypeError, match="expected an array of NumPy or CuPy, got list"):
        kind_of([1.0])


def test_numbers_that_follow_one_another_are_passed_as_a_struct():
    kernel = next(one for one in all_kernels() if one.name == "valid_positions_of_few_lengths<unsigned int, 32>")

    @Launcher
    def pack(operands, numbers, taken):
        words = arrays.empty((2,), np.uint32, operands[0])
        padded = valid_positions.padded_sizes((3, 5))
        launch(kernel, 1, 256, (tuple(numbers[i] for i in taken), words, padded, 15, 2))
        return words

    for lengths in ([5, 0, 2], [1, 3, 5]):
        expected = sum(1 << 5 * n + i for n, length in enumerate(lengths) for i in range(length))
        words = pack((X,), (tuple(range(1, 33)),), (7, *lengths, *[0] * 29))
        assert words.tolist() == [expected, 0]
    for taken, error, message in (
        (range(31), TypeError, r"argument lengths \(FewLengths<32>\) does not consist of 31 numbers"),
        ([0, *range(2, 33)], ValueError, r"argument lengths .* needs numbers that follow one another"),
    ):
        with pytest.raises(error, match=message):
            pack((X,), (tuple(taken),), (0,) * 33)
