"""The generator: a seed, a counter, and nothing else."""

import json

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.reference.philox import random_words


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
    families = [gl.Generator(3, 4), gl.Generator(3, 5), gl.Generator(4, 4), gl.Generator(3, 4).spawn(1)[0]]
    seeds = {child.seed for parent in families for child in parent.spawn(100)}
    assert len(seeds) == 400


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


@pytest.fixture
def default_generator():
    before = gl.default_generator.get_state()
    yield gl.default_generator
    gl.default_generator.set_state(before)


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
