"""Every operation passes ``torch.library.opcheck``: schema, autograd, fake tensors, tracing."""

import pytest
import torch

import gpu_layers.torch as glt
from tests.torch.layers import channels_last, values

OPS = torch.ops.gpu_layers
SLIDING = ([2, 2], [1, 2], [1, 0], [1, 1], False, [])
SIDE_BY_SIDE = ([2, 2], [2, 2], [0, 0], [1, 1], False, [])
CUT_OFF = ([4, 4], [4, 4], [0, 0], [1, 1], True, [])
ADAPTIVE = ([], [], [], [], False, [3, 2])


def arguments():
    x = values((2, 3, 6, 6), torch.float32).requires_grad_()
    last = channels_last(x.detach()).requires_grad_()
    r = values((2, 3, 6, 6), torch.float32, 1).requires_grad_()
    w, b = (torch.rand(3, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2))
    mean, var = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.5, 1.0, 2.0])
    statistics = torch.stack([mean, var, (var + 1e-5).rsqrt(), w.detach(), b.detach()])
    seed = torch.tensor(-5)
    y, taps = OPS.max_pool(x.detach(), *SLIDING, False, False)
    dy = values(tuple(y.shape), torch.float32, 2).requires_grad_()
    norms = OPS.lp_pool(x.detach(), *SIDE_BY_SIDE, 3.0, False)
    indices = OPS.max_pool_indices(taps, [6, 6], *SLIDING, False, False)
    counter = torch.tensor(0)
    return {
        "dropout": (x, seed, 0, 0.4, -1, "inverted", False),
        "dropout, of channels": (last, seed, 5, 0.4, 2, "alpha", True),
        "dropout_add": (x, r, seed, 0, 0.3, False),
        "activation_dropout": (x, seed, 0, 0.3, "gelu", True, False),
        "activation_dropout_backward": (r, x, seed, 0, 0.3, "gelu", False, False),
        "activation_dropout, channels last": (last, seed, 0, 0.3, "relu", False, True),
        "activation_dropout_backward, channels last": (r, last, seed, 0, 0.3, "gelu", True, True),
        "batch_norm_training": (x, w, b, r, 1e-5, "silu", False),
        "batch_norm_training, plain": (last, w, None, None, 1e-5, "identity", True),
        "batch_norm_inference": (x, mean, var, w, b, r, 1e-5, "tanh", False),
        "batch_norm_backward": (r, x, w, b, x.detach(), statistics, "silu", True, [True] * 4, False),
        "batch_norm_backward, in part": (
            r,
            x,
            w,
            b,
            None,
            statistics,
            "silu",
            False,
            [True, False, True, False],
            False,
        ),
        "batch_norm_update": (mean.clone(), var.clone(), counter, statistics, 7, 0.1, False),
        "batch_norm_update, cumulative": (mean.clone(), var.clone(), counter, statistics, 7, None, True),
        "max_pool": (x, *SLIDING, False, False),
        "max_pool, adaptive": (last, *ADAPTIVE, False, True),
        "max_pool, wide": (last, *ADAPTIVE, True, True),
        "max_pool_backward": (dy, taps, [6, 6], *SLIDING, False, False),
        "max_pool_backward, wide": (dy, taps.int(), [6, 6], *SLIDING, True, False),
        "max_pool_gather": (x, taps, [6, 6], *SLIDING, False, False),
        "max_pool_indices": (taps, [6, 6], *SLIDING, False, False),
        "max_pool_indices, wide": (taps.int(), [6, 6], *SLIDING, True, False),
        "avg_pool": (x, *SLIDING, False, None, False),
        "avg_pool, adaptive": (last, *ADAPTIVE, True, None, True),
        "avg_pool_backward": (dy, [6, 6], *SLIDING, False, 3, False),
        "lp_pool": (x, *CUT_OFF, 3.0, False),
        "lp_pool, sums": (last, *CUT_OFF, 1.0, True),
        "lp_pool_backward": (norms.clone().requires_grad_(), x, [6, 6], *SIDE_BY_SIDE, 3.0, False),
        "max_unpool": (dy, indices, [6, 6], False),
        "max_unpool_backward": (r, indices, 2, False),
    }


CASES = arguments()


@pytest.mark.parametrize("name", list(CASES))
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name.partition(",")[0]).default, CASES[name])


def test_every_operation_is_checked():
    assert glt is not None
    names = {
        name.removeprefix("gpu_layers::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gpu_layers::")
    }
    assert names == {name.partition(",")[0] for name in CASES}
