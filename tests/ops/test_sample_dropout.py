"""Masks keyed by samples: a row's mask does not depend on the batch that the row is in."""

import numpy as np
import pytest

import gpu_layers as gl
from tests import philox_in_ints
from tests.inputs import LAYOUTS, accumulation_dtype, assert_same_bits, each_dtype, normal, unchanged

SEED, OFFSET = 2**63 + 12345, 2**32 + 7
IDS = np.array([5, -1, 2**63 - 1, -(2**63), 0, 6, 10**12, 3], np.int64)


def dropped(x, ids, start=0, p=0.4):
    y, saved = gl.ops.dropout_forward(x, p, SEED, OFFSET, sample_ids=ids, start=start)
    return y, gl.ops.dropout_backward(x, saved)


def keep_of(ids, features, start=0, p=0.4):
    seeds = [philox_in_ints.sample_seed(SEED, int(i)) for i in ids]
    return np.array([philox_in_ints.kept(features, p, seed, OFFSET, start) for seed in seeds])


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 13), (8, 4, 3), (8,), (8, 1)])
def test_values(dtype, layout, shape):
    x = layout(normal(shape, dtype))
    features = x.size // 8
    wide = accumulation_dtype(dtype)
    scaled = (x.astype(wide) * wide.type(1 / (1 - 0.4))).astype(dtype)
    expected = np.where(keep_of(IDS, features, 2**34 - 6).reshape(shape), scaled, dtype.type(0))
    with unchanged(x, IDS):
        y, dx = dropped(x, IDS, 2**34 - 6)
    assert_same_bits(y, expected)
    assert_same_bits(dx, expected)


def test_order_size_and_repetition_of_the_batch_do_not_matter():
    x = normal((8, 37), np.float32)
    whole = dropped(x, IDS)
    order = np.random.default_rng(0).permutation(8)
    for rows in (order, order[:3], [2], [4, 4, 1]):
        for part, all_of_it in zip(dropped(x[rows], IDS[rows]), whole, strict=True):
            assert_same_bits(part, all_of_it[rows])


def test_shards_of_the_features_do_not_matter():
    x = normal((8, 37), np.float32)
    whole, _ = dropped(x, IDS)
    for first, last in ((0, 5), (5, 6), (6, 37)):
        assert_same_bits(dropped(x[:, first:last], IDS, first)[0], whole[:, first:last])


def test_long_rows_and_many_rows():
    # Longer than a piece of the walk, and more rows than one piece takes.
    for shape in ((3, 2**16 + 7), (9000, 8)):
        ids = np.arange(shape[0]) * 3
        y, _ = dropped(np.ones(shape, np.float32), ids, 1)
        for row in (0, 1, shape[0] - 1):
            keep = gl.ops.dropout_mask(shape[1], 0.4, philox_in_ints.sample_seed(SEED, int(ids[row])), OFFSET, 1)
            np.testing.assert_array_equal(y[row] != 0, keep)


def test_it_is_not_the_mask_without_samples():
    x = np.ones((1, 256), np.float32)
    plain, _ = gl.ops.dropout_forward(x, 0.5, SEED, OFFSET)
    keyed = {dropped(x, np.array([i]), p=0.5)[0].tobytes() for i in range(16)}
    assert len(keyed) == 16
    assert plain.tobytes() not in keyed


def test_offsets_and_seeds_give_other_masks():
    x, ids = np.ones((2, 128), np.float32), np.array([0, 1])
    masks = {
        gl.ops.dropout_forward(x, 0.5, seed, offset, sample_ids=ids)[0].tobytes()
        for seed in (0, 1, 2**32)
        for offset in (0, 1, 2**32)
    }
    assert len(masks) == 9


def test_neighbouring_samples_are_independent():
    # Agreeing bits of two masks of 64,000 decisions at p = 0.5: 32,000 +- 126.5. Six deviations, for each of 63 pairs
    # of neighbours and of ids at a distance of 2**32.
    near = np.ones((64, 64000), np.float32)
    for ids in (np.arange(64), np.arange(64) << 32):
        keep = dropped(near, ids, p=0.5)[0] != 0
        agreeing = (keep[1:] == keep[:-1]).sum(axis=1)
        assert np.abs(agreeing - 32000).max() < 6 * 126.5


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("features", [5, 8])
@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_changing_the_ids_afterwards_changes_nothing(backend, features, given):
    x, ids = normal((8, features)), IDS.copy()
    with gl.use_backend(backend):
        y, saved = gl.ops.dropout_forward(x, 0.5, SEED, OFFSET, sample_ids=ids, out=np.empty_like(x) if given else None)
        ids[:] = 0
        assert_same_bits(saved.mask.sample_ids, IDS)
        assert_same_bits(gl.ops.dropout_backward(x, saved), y)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape):
    y, dx = dropped(np.ones(shape), np.arange(shape[0]))
    assert y.shape == dx.shape == shape


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones(()), {}, r"^sample_ids need an input with rows, got a 0-d input and \[2\]$"),
        (np.ones((2, 3)), {"mask_axes": 1}, "sample_ids need a mask over all axes"),
        (np.ones((3, 3)), {}, r"sample_ids must have the shape \[3\], one number per row, got \[2\]"),
    ],
)
def test_ids_that_do_not_fit_are_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        gl.ops.dropout_forward(x, 0.5, 1, 2, sample_ids=np.arange(2), **options)


def test_a_layer_passes_them_on_in_training():
    layer = gl.Dropout(0.4, generator=gl.Generator(SEED, OFFSET))
    x = normal((8, 13), np.float32)
    y, dx = dropped(x, IDS)
    assert_same_bits(layer(x, sample_ids=IDS), y)
    assert_same_bits(layer.backward(x), dx)
    assert layer.generator.offset == OFFSET + 1
    with pytest.raises(TypeError, match="sample_ids must be int64"):
        layer(x, sample_ids=IDS.astype(np.int32))
    assert layer.generator.offset == OFFSET + 1
    assert_same_bits(layer.backward(x), dx)
    assert layer.eval()(x, sample_ids=IDS) is x
    with pytest.raises(ValueError, match="sample_ids must have the shape"):
        layer(x, sample_ids=IDS[:3])
