"""All poolings: what is saved is nobody else's, bad input reaches no kernel, and profilers see every layer."""

import numpy as np
import pytest

import gpu_layers as gl
from gpu_layers.runtime import ranges
from tests.inputs import normal

ops = gl.ops
FORWARD = {
    "max": lambda x: ops.max_pool_forward(x, (3, 3), 2, 1),
    "max of many taps": lambda x: ops.max_pool_forward(x, (17, 17), 1, 8),
    "max lengths": lambda x: ops.max_pool_forward(x, (3, 3), 2, 1, lengths=LENGTHS),
    "avg": lambda x: ops.avg_pool_forward(x, (3, 3), 1, 1, count_include_pad=False),
    "avg lengths": lambda x: ops.avg_pool_forward(x, (2, 2), lengths=LENGTHS),
    "adaptive max": lambda x: ops.adaptive_max_pool_forward(x, (5, 7)),
    "global max": lambda x: ops.adaptive_max_pool_forward(x, (1, 1)),
    "adaptive avg": lambda x: ops.adaptive_avg_pool_forward(x, (5, 7)),
    "lp": lambda x: ops.lp_pool_forward(x, 3, (2, 2)),
    "lp inf": lambda x: ops.lp_pool_forward(x, np.inf, (2, 2)),
    "unpool": lambda x: ops.max_unpool_forward(x, INDICES[: len(x)] if x.ndim == 4 else INDICES[0], (36, 36)),
}
BACKWARD = {"max": ops.max_pool_backward, "global": ops.max_pool_backward, "avg": ops.avg_pool_backward}
BACKWARD |= {"lp": ops.lp_pool_backward, "unpool": ops.max_unpool_backward}
LENGTHS = np.array([[18, 18], [7, 3]])
INDICES = np.zeros((2, 3, 18, 18), np.int64)


def backward_of(name):
    return BACKWARD[name.split()[-1] if name.startswith("adaptive") else name.split()[0]]


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("name", FORWARD)
def test_what_the_caller_changes_does_not_change_the_gradient(name, backend):
    LENGTHS[:], INDICES[:] = [[18, 18], [7, 3]], np.arange(18 * 18).reshape(18, 18)
    for batched in (True, False):
        if not batched and "lengths" in name:
            continue
        x = normal((2, 3, 18, 18) if batched else (3, 18, 18), np.float32)
        with gl.use_backend(backend):
            y, saved = FORWARD[name](x)
            dy = normal(y.shape, np.float32, 1)
            given = dy.copy()
            dx = backward_of(name)(dy, saved)
            expected = dx.copy()
            # LP pooling keeps x itself, as batch norm does.
            for mine in (y, dx, LENGTHS, INDICES) if "lp" in name else (x, y, dx, LENGTHS, INDICES):
                mine[...] = 1
            if hasattr(saved, "taps") and saved.argmax is not None and "lp" not in name:
                ops.max_pool_indices(saved)[...] = 0
            again = backward_of(name)(dy, saved)
        assert again.tobytes() == expected.tobytes()
        assert dy.tobytes() == given.tobytes()
        LENGTHS[:], INDICES[:] = [[18, 18], [7, 3]], np.arange(18 * 18).reshape(18, 18)


X = np.ones((2, 3, 6, 6), np.float32)
BAD = {
    "kernel": lambda: ops.max_pool_forward(X, (0, 2)),
    "stride": lambda: ops.avg_pool_forward(X, (2, 2), -1),
    "padding": lambda: ops.max_pool_forward(X, (2, 2), padding=2),
    "dilation": lambda: ops.avg_pool_forward(X, (2, 2), dilation=0),
    "size": lambda: ops.max_pool_forward(X, (7, 7)),
    "divisor": lambda: ops.avg_pool_forward(X, (2, 2), divisor_override=0),
    "rank": lambda: ops.avg_pool_forward(X[0, 0], (2, 2)),
    "integers": lambda: ops.avg_pool_forward(X.astype(np.int32), (2, 2)),
    "booleans": lambda: ops.adaptive_avg_pool_forward(X > 0, (2, 2)),
    "complex": lambda: ops.lp_pool_forward(X + 1j, 2, (2, 2)),
    "output size": lambda: ops.adaptive_max_pool_forward(X, (2, -1)),
    "power": lambda: ops.lp_pool_forward(X, 0, (2, 2)),
    "lengths": lambda: ops.max_pool_forward(X, (2, 2), lengths=[[7, 6], [6, 6]]),
    "index type": lambda: ops.max_unpool_forward(X, X, (12, 12)),
    "index shape": lambda: ops.max_unpool_forward(X, np.zeros((2, 3, 6, 5), np.int64), (12, 12)),
    "unpooled size": lambda: gl.MaxUnpool2d(2)(X, np.zeros(X.shape, np.int64), output_size=(99, 99)),
    "gradient": lambda: ops.max_pool_backward(X, ops.max_pool_forward(X, (2, 2))[1]),
    "gradient type": lambda: ops.avg_pool_backward(X[:, :, ::2, ::2] > 0, ops.avg_pool_forward(X, (2, 2))[1]),
}


def recorded(launched):
    """Emulated, with the names of the kernels in a list."""
    return gl.use_backend("emulated", record=lambda kernel, _: launched.append(kernel.name.split("<")[0]), check=True)


@pytest.mark.parametrize("what", BAD)
def test_nothing_is_launched_for_bad_input(what):
    launched = []
    with recorded(launched), pytest.raises((TypeError, ValueError)):
        BAD[what]()
    # What made the saved state of a gradient that does not fit.
    assert [name for name in launched if "backward" in name or "forward" not in name] == []
    assert len(launched) == what.startswith("gradient")


def test_an_index_outside_the_plane_is_found_before_anything_is_written():
    launched = []
    indices = np.full(X.shape, 144)
    message = r"^Found an invalid max index: 144 \(output volumes are of size 12x12\)$"
    with recorded(launched), pytest.raises(ValueError, match=message):
        ops.max_unpool_forward(X, indices, (12, 12))
    assert launched == ["max_unpool_keep"]


LAYERS = [
    *(
        getattr(gl, f"{kind}Pool{rank}d")(2)
        for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg")
        for rank in (1, 2, 3)
    ),
    *(getattr(gl, f"LPPool{rank}d")(2, 2) for rank in (1, 2, 3)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_profilers_see_both_passes(layer):
    seen = []
    ranges._switch_on(seen.append, lambda: None)
    try:
        rank = int(type(layer).__name__[-2])
        layer.backward(layer(np.ones((2, 3, *(4,) * rank), np.float32)))
    finally:
        ranges._switch_off()
    assert seen == [f"{type(layer).__name__}.forward", f"{type(layer).__name__}.backward"]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_profilers_see_unpooling(rank):
    layer = getattr(gl, f"MaxUnpool{rank}d")(2)
    seen = []
    ranges._switch_on(seen.append, lambda: None)
    try:
        x = np.ones((2, 3, *(2,) * rank), np.float32)
        layer.backward(layer(x, np.zeros(x.shape, np.int64)))
    finally:
        ranges._switch_off()
    assert seen == [f"MaxUnpool{rank}d.forward", f"MaxUnpool{rank}d.backward"]
