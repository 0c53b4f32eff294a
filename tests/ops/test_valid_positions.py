"""The positions of a padded batch that count: their bits, how many they are, and the first."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers import reference
from gpu_layers.core.cuda import import_cupy
from gpu_layers.core.valid import mask_of_lengths
from gpu_layers.ops import padding
from gpu_layers.ops.padding import part_of, valid_positions
from tests.inputs import LAYOUTS, assert_same_bits

SHAPES = [(5, 7), (3, 5, 13), (2, 3, 4, 5), (1, 32), (4, 64), (2, 31), (1, 1), (33,), (0, 4), (3, 1, 2000)]
# Lengths that kernels of more take by value, and too many for all of them.
SHAPES += [(40, 6), (97, 3, 2), (300, 5)]


def lengths_of(shape, seed=0):
    """Of each sample; among them none and all."""
    sizes = np.array(shape[1:])
    own = np.random.default_rng(seed).integers(0, sizes + 1, (shape[0], len(sizes)))
    own[:1], own[1:2] = sizes, 0
    return own


def counted(shape, own):
    """One position after the other."""
    return np.array([all(i < n for i, n in zip(p[1:], own[p[0]], strict=True)) for p in np.ndindex(shape)], bool)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_pack_what_the_reference_packs(shape):
    mask = np.random.default_rng(1).random(shape) < 0.5
    strided = LAYOUTS["fortran"](LAYOUTS["backwards"](mask))
    given = [(None, mask), (None, strided)] + ([(lengths_of(shape), None)] if len(shape) > 1 else [])
    for own, of_mask in given:
        expected = mask.reshape(-1) if own is None else counted(shape, own)
        words = reference.valid_words(shape, own, of_mask, mask)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        assert_same_bits(bits[: expected.size].view(bool), expected)
        assert not bits[expected.size :].any()
        assert words.size == -(-expected.size // 32) + 1
        with gl.use_backend("emulated", check=True):
            assert_same_bits(padding.backend_for(mask).valid_words(shape, own, of_mask, mask), words)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1], ids=str)
def test_count_first_and_parts(shape):
    own = lengths_of(shape)
    x, mask = np.zeros((shape[0], 2, *shape[1:])), mask_of_lengths(own, shape)
    assert_same_bits(mask, counted(shape, own).reshape(shape))
    for valid in (valid_positions(x, own, None, False), valid_positions(x, None, mask, False)):
        places = np.flatnonzero(mask)
        assert (valid.count, valid.first) == (places.size, places[0] if places.size else 0)
        assert valid.before == tuple(mask[:n].sum() for n in range(shape[0] + 1))
        part = part_of(valid, 1, shape[0], x)
        assert_same_bits(part.mask.copy(), mask[1:])
        places = np.flatnonzero(mask[1:])
        assert (part.count, part.first) == (places.size, places[0] if places.size else 0)


def test_layers_share_positions_by_the_values_of_lengths():
    """While one has them. Arrays that change afterwards, and other sizes, are others."""
    x, own = np.zeros((3, 2, 5)), np.array([5, 0, 3])
    first = valid_positions(x, own, None, False)
    assert valid_positions(x, [5, 0, 3], None, False) is first
    assert valid_positions(np.zeros((3, 2, 6)), own, None, False) is not first
    own[0] = 4
    assert valid_positions(x, own, None, False) is not first
    assert first.count == 8
    assert first.mask[0].all()
    with pytest.raises(ValueError, match=r"lengths must be in 0 \.\. the input's size \[4\]"):
        valid_positions(np.zeros((3, 2, 4)), [5, 0, 3], None, False)
    del first
    gc.collect()
    assert len(padding._in_use) == 0


@pytest.mark.gpu
def test_default_streams_of_two_threads_share_no_words():
    """They have one handle, and nothing orders their work."""
    cupy = import_cupy()

    def found():
        with cupy.cuda.Stream.ptds:
            return valid_positions(cupy.zeros((3, 2, 5)), [5, 0, 3], None, False)

    mine = found()
    assert found() is mine
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(found).result() is not mine
