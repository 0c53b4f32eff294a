"""The generator: a seed, a counter, and nothing else."""

import copy
import json
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.core.philox import random_words


def test_offset_counts_calls():
    generator = gl.Generator(7)
    assert (generator.seed, generator.offset) == (7, 0)
    assert [generator.next_offset() for _ in range(3)] == [0, 1, 2]
    assert (generator.seed, generator.offset) == (7, 3)


def test_offset_can_start_anywhere_and_wraps_at_64_bits():
    generator = gl.Generator(seed=2**64 - 1, offset=2**64 - 1)
    assert generator.next_offset() == 2**64 - 1
    assert generator.offset == 0


def test_seed_is_random_where_none_is_given():
    seeds = {gl.Generator().seed for _ in range(8)}
    assert len(seeds) == 8  # a repeat among 8 of 2**64: a chance of 1.5e-18
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_numpy_integers_are_integers():
    generator = gl.Generator(np.uint64(2**64 - 1), np.int32(4))
    assert generator.get_state() == {"seed": 2**64 - 1, "offset": 4}
    assert all(type(value) is int for value in generator.get_state().values())


def test_state_survives_json_and_brings_back_the_stream():
    generator = gl.Generator(2**64 - 5, 12)
    state = json.loads(json.dumps(generator.get_state()))
    ahead = [generator.next_offset() for _ in range(3)]
    other = gl.Generator(1)
    other.set_state(state)
    assert other.seed == 2**64 - 5
    assert [other.next_offset() for _ in range(3)] == ahead


def test_state_is_a_copy():
    generator = gl.Generator(1)
    state = generator.get_state()
    state["seed"] = 9
    assert generator.seed == 1


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ([("seed", 1), ("offset", 2)], TypeError),
        (None, TypeError),
        ({"seed": 1}, ValueError),
        ({"seed": 1, "offset": 2, "more": 3}, ValueError),
        ({"seed": -1, "offset": 2}, ValueError),
        ({"seed": 1, "offset": 2**64}, ValueError),
        ({"seed": 1.0, "offset": 2}, TypeError),
        ({"seed": 1, "offset": "2"}, TypeError),
        ({"seed": True, "offset": 2}, TypeError),
    ],
)
def test_bad_state_is_refused_whole(state, error):
    generator = gl.Generator(5, 6)
    with pytest.raises(error):
        generator.set_state(state)
    assert generator.get_state() == {"seed": 5, "offset": 6}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed must be in 0 \.\. 18446744073709551615, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got float"),
        ({"seed": "1"}, TypeError, "seed must be an integer, got str"),
        ({"seed": False}, TypeError, "seed must be an integer, got bool"),
        ({"seed": 1, "offset": -1}, ValueError, "offset must be in"),
        ({"seed": 1, "offset": 2**64}, ValueError, "offset must be in"),
        ({"seed": 1, "offset": None}, TypeError, "offset must be an integer, got NoneType"),
    ],
)
def test_bad_numbers_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        gl.Generator(**arguments)


def test_spawned_streams_are_distinct_and_repeatable():
    parent = gl.Generator(3, 4)
    children = parent.spawn(1000)
    assert parent.get_state() == {"seed": 3, "offset": 4}
    assert len({child.seed for child in children} | {parent.seed}) == 1001
    assert [child.offset for child in children] == [0] * 1000
    assert [child.seed for child in gl.Generator(3, 4).spawn(1000)] == [child.seed for child in children]
    assert [child.seed for child in parent.spawn(3)] == [child.seed for child in children[:3]]


def test_streams_spawned_elsewhere_are_others():
    families = [gl.Generator(seed, offset) for seed in (3, 4, 2**32 + 3) for offset in (4, 5, 2**32 + 4, 2**63 + 4)]
    families.append(gl.Generator(3, 4).spawn(1)[0])
    seeds = {child.seed for parent in families for child in parent.spawn(100)}
    assert len(seeds) == 1300


def test_a_state_starts_the_weights_anew():
    generator, other = gl.Generator(3), gl.Generator(3)
    first = generator.weights().random(3)
    assert (generator.weights().random(3) != first).all()
    generator.set_state({"seed": 3, "offset": 7})
    assert (generator.weights().random(3) == first).all()
    assert (other.weights().random(3) == first).all()
    generator.set_state({"seed": 4, "offset": 0})
    assert (generator.weights().random(3) != first).all()
    assert generator.offset == 0


def test_spawned_streams_look_independent():
    # Of 10,000 bits, those in which two independent streams agree are 5,000 +- 50: six deviations.
    a, b = (random_words(child.seed, 0, 0, 10_000) for child in gl.Generator(0).spawn(2))
    for bit in (0, 15, 31):
        assert abs(int((((a ^ b) >> bit) & 1).sum()) - 5000) < 300


@pytest.mark.parametrize(("n", "error"), [(-1, ValueError), (1.0, TypeError), ("2", TypeError), (True, TypeError)])
def test_spawn_refuses_what_is_no_count(n, error):
    with pytest.raises(error, match="n must be"):
        gl.Generator(1).spawn(n)


def test_spawn_of_none():
    assert gl.Generator(1).spawn(0) == []


def test_manual_seed_restarts_the_default_generator(default_generator):
    default_generator.next_offset()
    assert gl.manual_seed(2**64 - 1) is default_generator is gl.random.default_generator
    assert default_generator.get_state() == {"seed": 2**64 - 1, "offset": 0}


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**64, ValueError), (None, TypeError), (1.0, TypeError)]
)
def test_manual_seed_refuses_what_is_no_seed(default_generator, seed, error):
    default_generator.set_state({"seed": 1, "offset": 2})
    with pytest.raises(error):
        gl.manual_seed(seed)
    assert default_generator.get_state() == {"seed": 1, "offset": 2}


def test_repr_shows_seed_and_offset():
    assert repr(gl.Generator(5, 6)) == "Generator(seed=5, offset=6)"


def test_seed_and_offset_are_read_only():
    generator = gl.Generator(1)
    for name in ("seed", "offset"):
        with pytest.raises(AttributeError):
            setattr(generator, name, 3)


@pytest.fixture
def hasty_threads():
    """Threads that take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_four_threads(call, times=15):
    """The results of so many calls in each of four threads that begin together."""
    together = threading.Barrier(4)

    def work(_):
        together.wait()
        return [call() for _ in range(times)]

    with ThreadPoolExecutor(4) as pool:
        return [result for part in pool.map(work, range(4)) for result in part]


X = np.ones((40, 50), np.float32)
CALLS = {
    "next_offset": lambda generator: generator.next_offset,
    "a layer of each thread": lambda generator: lambda: gl.Dropout(0.5, generator=generator)(X).tobytes(),
    "AlphaDropout": lambda generator: lambda: gl.AlphaDropout(0.5, generator=generator)(X).tobytes(),
    "one layer": lambda generator: shared(gl.Dropout2d(0.5, generator=generator), X[None]),
    "ActivationDropout": lambda generator: shared(gl.ActivationDropout("relu", generator=generator), X),
    "sample_ids": lambda generator: lambda: gl.Dropout(generator=generator)(X, sample_ids=np.arange(40)).tobytes(),
}


def shared(layer, x):
    return lambda: layer(x).tobytes()


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("kind", CALLS)
def test_each_call_of_four_threads_gets_a_mask_of_its_own(kind, on_device):
    generator = gl.CudaGraphGenerator(1, device="cpu") if on_device else gl.Generator(1)
    results = in_four_threads(CALLS[kind](generator))
    assert len(set(results)) == 60
    assert generator.get_state() == {"seed": 1, "offset": 60}
    # Together they are the masks of 60 calls in a row.
    alone = gl.CudaGraphGenerator(1, device="cpu") if on_device else gl.Generator(1)
    one_by_one = CALLS[kind](alone)
    assert set(results) == {one_by_one() for _ in range(60)}


@pytest.mark.usefixtures("hasty_threads")
def test_the_default_generator_is_shared_by_threads():
    gl.manual_seed(4)
    assert len(set(in_four_threads(lambda: gl.Dropout()(X).tobytes()))) == 60
    assert gl.default_generator.get_state() == {"seed": 4, "offset": 60}


@pytest.mark.usefixtures("hasty_threads")
def test_passes_of_four_threads_do_not_overlap():
    generator = gl.Generator(1)
    means = in_four_threads(lambda: gl.mc_dropout(gl.Dropout(generator=generator), X, passes=3)[0].tobytes(), times=5)
    alone = gl.Generator(1)
    assert set(means) == {gl.mc_dropout(gl.Dropout(generator=alone), X, passes=3)[0].tobytes() for _ in range(20)}
    assert len(set(means)) == 20
    assert generator.offset == 60


@pytest.mark.usefixtures("hasty_threads")
def test_state_is_read_whole_while_others_write_it():
    generator = gl.Generator(0, 0)

    def write_and_read():
        state = generator.get_state()
        generator.set_state({"seed": state["seed"] + 1, "offset": state["seed"] + 1})
        return generator.get_state()

    for state in in_four_threads(write_and_read, times=500):
        assert state["seed"] == state["offset"]


@pytest.mark.parametrize("make", [gl.Generator, partial(gl.CudaGraphGenerator, device="cpu")])
def test_an_offset_is_given_back_only_where_nobody_took_the_next(make):
    generator = make(1, 2**64 - 1)
    seed, offset = generator.take(3)
    assert (seed, offset, generator.offset) == (1, 2**64 - 1, 2)
    generator.give_back(offset, 3)
    assert generator.offset == 2**64 - 1
    generator.take(3)
    assert generator.next_offset() == 2
    generator.give_back(offset, 3)
    assert generator.offset == 3


@pytest.mark.parametrize("make", [gl.Generator, lambda *state: gl.CudaGraphGenerator(*state, device="cpu")])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_have_the_state_and_go_on_alone(make, copied):
    generator = make(5, 7)
    other = copied(generator)
    assert other.get_state() == {"seed": 5, "offset": 7}
    assert [other.next_offset(), other.next_offset(), generator.next_offset()] == [7, 8, 7]
    # A copied layer too; the copy's lock is not the other's.
    layer = copied(gl.Dropout(0.5, generator=generator))
    assert layer(X).tobytes() == gl.Dropout(0.5, generator=make(5, 8))(X).tobytes()
    assert generator.offset == 8
