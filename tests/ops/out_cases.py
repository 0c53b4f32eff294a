"""Operations that take ``out=``, forward and backward, and what may be overwritten by it."""

import numpy as np
import pytest

from gpu_layers import ops
from gpu_layers.distributed import Communicator, SingleProcess
from gpu_layers.ops.padding import valid_positions
from tests.inputs import accumulation_dtype, normal, to_channels_last

X = normal((2, 3, 7, 6), np.float32)
#: Planes of whole vectors.
WHOLE = normal((2, 4, 8, 8), np.float32, 1)
ONES = np.ones(3, np.float32)


def pool_cases():
    for last in (False, True):
        x = np.ascontiguousarray(np.moveaxis(X, 1, -1)) if last else X
        options = {"channels_last": last}
        yield (
            "max_pool",
            x,
            lambda x, o=options, **k: ops.max_pool_forward(x, (3, 2), 2, 1, **o, **k),
            ops.max_pool_backward,
        )
        yield (
            "avg_pool",
            x,
            lambda x, o=options, **k: ops.avg_pool_forward(x, (2, 3), 1, **o, **k),
            ops.avg_pool_backward,
        )
        for p in (1.0, 2.5, float("inf")):
            yield (
                f"lp_pool {p}",
                x,
                lambda x, p=p, o=options, **k: ops.lp_pool_forward(x, p, (2, 3), 2, **o, **k),
                ops.lp_pool_backward,
            )
        yield (
            "adaptive_max_pool",
            x,
            lambda x, o=options, **k: ops.adaptive_max_pool_forward(x, (3, 4), **o, **k),
            ops.max_pool_backward,
        )
        yield (
            "global_avg_pool",
            x,
            lambda x, o=options, **k: ops.adaptive_avg_pool_forward(x, (1, 1), **o, **k),
            ops.avg_pool_backward,
        )
    yield "unbatched max_pool", X[0], lambda x, **k: ops.max_pool_forward(x, (2, 2), **k), ops.max_pool_backward
    yield "unbatched avg_pool", X[0], lambda x, **k: ops.avg_pool_forward(x, (2, 2), **k), ops.avg_pool_backward


class TwoAlike(Communicator):
    """The first of two processes, of which the other one sends the same."""

    rank, size = 0, 2

    def gather(self, values):
        return np.stack([values, values])


def channels_of(x, last=False):
    """Positive numbers, of the dtype of a batch norm's statistics."""
    return np.arange(1, x.shape[-1 if last else 1] + 1).astype(accumulation_dtype(x.dtype))


def batch_norm(x, residual=False, last=False, **options):
    given = channels_of(x, last), None
    return ops.batch_norm_forward(
        x, *given, residual=x[::-1].copy() if residual else None, channels_last=last, **options
    )


def inference(x, last=False, **options):
    return ops.batch_norm_inference(x, *[channels_of(x, last)] * 3, None, channels_last=last, **options)


def ghost(x, bounds=(0, 1, 2), last=False, **options):
    return ops.ghost_batch_norm_forward(x, channels_of(x, last), None, bounds=bounds, channels_last=last, **options)


def sync(x, communicator, last=False, **options):
    return ops.sync_batch_norm_forward(x, channels_of(x, last), None, communicator, channels_last=last, **options)


def second(dy, saved, **options):
    """Second derivatives as the backward of a backward: the first result is like dy."""
    ddresidual = None if saved.residual is None else normal(dy.shape, dy.dtype, 8)
    given = normal(dy.shape, dy.dtype, 7), saved.mean, None, dy, saved
    return ops.batch_norm_double_backward(*given, ddresidual=ddresidual, **options)


def valid_of(x, last=False):
    return valid_positions(x, [(3, 4), (7, 2)], None, last)


def norm_cases():
    for last in (False, True):
        x, o = (to_channels_last(X) if last else X), {"last": last}
        yield "batch_norm", x, lambda x, o=o, **k: batch_norm(x, **o, **k), ops.batch_norm_backward
        relu = {"activation": "relu", "residual": True, **o}
        yield "batch_norm sum relu", x, lambda x, o=relu, **k: batch_norm(x, **o, **k), ops.batch_norm_backward
        gelu = {"activation": "gelu", **o}
        yield "batch_norm gelu", x, lambda x, o=gelu, **k: batch_norm(x, **o, **k), ops.batch_norm_backward
        yield "inference", x, lambda x, o=o, **k: inference(x, **o, **k), ops.batch_norm_inference_backward
        yield "inference gelu", x, lambda x, o=gelu, **k: inference(x, **o, **k), ops.batch_norm_inference_backward
        yield "ghost", x, lambda x, o=o, **k: ghost(x, **o, **k), ops.ghost_batch_norm_backward
        yield (
            "padded ghost",
            x,
            lambda x, o=relu | {"residual": None}, **k: ghost(x, valid=valid_of(x, o["last"]), **o, **k),
            ops.ghost_batch_norm_backward,
        )
        for name, communicator in (("one", SingleProcess()), ("two", TwoAlike())):
            yield (
                f"sync of {name}",
                x,
                lambda x, c=communicator, o=gelu, **k: sync(x, c, **o, **k),
                ops.sync_batch_norm_backward,
            )
        yield (
            "padded sync of two",
            x,
            lambda x, o=o, **k: sync(x, TwoAlike(), valid=valid_of(x, o["last"]), **o, **k),
            ops.sync_batch_norm_backward,
        )
        yield "second", x, lambda x, o=relu, **k: batch_norm(x, **o, **k), second
    yield "ghost of one group", X, lambda x, **k: ghost(x, bounds=(0, 2), **k), ops.ghost_batch_norm_backward
    yield "second of whole planes", WHOLE, batch_norm, second


def norm_pool_cases():
    for last in (False, True):
        for name, values, activation, window in (
            ("2x2", WHOLE, "relu", ((2, 2),)),
            ("3x3", WHOLE, None, ((3, 3), 2, 1)),
            ("any", X, "leaky_relu", ((3, 2), 2, 1)),
            ("gelu", X, "gelu", ((2, 2),)),
        ):
            x, o = (to_channels_last(values) if last else values), {"activation": activation, "channels_last": last}
            yield (
                f"batch_norm max_pool {name}",
                x,
                lambda x, w=window, o=o, **k: ops.batch_norm_max_pool_forward(
                    x, channels_of(x, o["channels_last"]), None, *w, **o, **k
                ),
                ops.batch_norm_max_pool_backward,
            )
            yield (
                f"inference max_pool {name}",
                x,
                lambda x, w=window, o=o, **k: ops.batch_norm_max_pool_inference(
                    x, *[channels_of(x, o["channels_last"])] * 3, None, *w, **o, **k
                ),
                ops.batch_norm_max_pool_inference_backward,
            )


def activated(x, activation="relu", order="after", **options):
    return ops.activation_dropout_forward(x, activation, 0.5, 1, 2, order=order, **options)


def added(x, activation=None, bias=False, **options):
    bias = channels_of(x, True) if bias else None
    return ops.dropout_add_forward(x, x[::-1].copy(), 0.5, 1, 2, activation=activation, bias=bias, **options)


#: Those whose forward saves nothing of x.
ELEMENTWISE = {
    "relu": (ops.relu_forward, ops.relu_backward),
    "dropout": (lambda x, **k: ops.dropout_forward(x, 0.5, 1, 2, **k), ops.dropout_backward),
    "relu dropout": (activated, ops.activation_dropout_backward),
    "dropout relu": (lambda x, **k: activated(x, order="before", **k), ops.activation_dropout_backward),
    "no activation, dropout": (lambda x, **k: activated(x, "identity", **k), ops.activation_dropout_backward),
}
#: Those whose backward reads x.
CURVED = {
    "gelu dropout": lambda x, **k: activated(x, "gelu", **k),
    "dropout tanh": lambda x, **k: activated(x, "tanh", order="before", **k),
    "relu dropout, channels last": lambda x, **k: activated(x, channels_last=True, **k),
    "gelu dropout, channels last": lambda x, **k: activated(x, "gelu", channels_last=True, **k),
}
NORMS = list(norm_cases())
MAY_BE_DY = [(name, X, *pair) for name, pair in ELEMENTWISE.items()]
MAY_BE_DY += [(name, X, forward, ops.activation_dropout_backward) for name, forward in CURVED.items()]
MAY_BE_DY += NORMS
#: Those whose backward still needs dy, or returns it.
APART = [*norm_pool_cases()]
for of_sum in ({}, {"activation": "relu"}, {"activation": "gelu"}):
    for has_bias in (False, True):
        title = f"dropout_add {of_sum.get('activation')} {'bias' if has_bias else ''}"
        APART.append(
            (title, X, lambda x, o=of_sum, b=has_bias, **k: added(x, bias=b, **o, **k), ops.dropout_add_backward)
        )
CASES = [*pool_cases(), *MAY_BE_DY, *APART]


def each(cases):
    return pytest.mark.parametrize(
        ("x", "forward", "backward"),
        [case[1:] for case in cases],
        ids=[f"{name} {'NHWC' if x.shape[-1] in (3, 4) else 'NCHW'}" for name, x, *_ in cases],
    )


each_case = each(CASES)


def listed(result):
    """The arrays of a result."""
    return [one for one in result if one is not None] if isinstance(result, tuple) else [result]
