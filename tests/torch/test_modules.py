"""PyTorch's own samples of its modules, run on ours; what modules show, save and refuse."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import gpu_layers as gl
import gpu_layers.torch as glt
from gpu_layers.torch.modules import COUNTERPARTS
from tests.torch.layers import first, values

common_modules = pytest.importorskip("torch.testing._internal.common_modules", reason="needs expecttest")

NAMES = {theirs.__name__ for theirs in COUNTERPARTS}
COVERED = [info for info in common_modules.module_db if info.module_cls.__name__ in NAMES]


def both(info, sample, training):
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    ours, theirs = (
        getattr(lib, info.module_cls.__name__)(*arguments, **options).double().train(training) for lib in (glt, nn)
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", COVERED, ids=lambda one: one.module_cls.__name__)
def test_pytorchs_samples(info, training):
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    ):
        ours, theirs = both(info, sample, training)
        assert repr(ours) == repr(theirs)
        x = sample.forward_input.args[0]
        if "LPPool" in info.module_cls.__name__:
            x = x.abs() + 0.1  # ours takes abs(x)
        a, b = (x.detach().clone().requires_grad_() for _ in range(2))
        y, z = ours(a), theirs(b)
        if isinstance(z, tuple):
            assert torch.equal(y[1], z[1])
        y, z = first(y), first(z)
        torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-11)
        assert y.stride() == z.stride()
        dy = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
        inputs = [[a, *ours.parameters()], [b, *theirs.parameters()]]
        for p, q in zip(
            *(torch.autograd.grad(r, given, dy) for r, given in zip((y, z), inputs, strict=True)), strict=True
        ):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
        for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "info",
    [one for one in COVERED if one.module_error_inputs_func],
    ids=lambda one: one.module_cls.__name__,
)
def test_pytorchs_error_samples(info):
    for sample in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        given = sample.module_error_input

        def run(lib, given=given):
            module = getattr(lib, info.module_cls.__name__)(
                *given.constructor_input.args, **given.constructor_input.kwargs
            )
            return module(*given.forward_input.args, **given.forward_input.kwargs)

        with pytest.raises(sample.error_type, match=sample.error_regex):
            run(glt)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_arguments_are_torchs(name):
    ours, theirs = (inspect.signature(getattr(lib, name)) for lib in (glt, nn))
    extra = [one for one in ours.parameters if one not in theirs.parameters]
    assert extra == (["generator"] if "Dropout" in name else [])
    assert [one for one in ours.parameters if one not in extra] == list(theirs.parameters)
    for one in theirs.parameters:
        assert ours.parameters[one].default == theirs.parameters[one].default
        assert ours.parameters[one].kind == theirs.parameters[one].kind
    assert issubclass(getattr(glt, name), getattr(nn, name))
    assert getattr(glt, name)._version == getattr(nn, name)._version


def model():
    return nn.Sequential(
        glt.BatchNorm2d(3),
        glt.Dropout(0.2, generator=gl.Generator(5, 7)),
        glt.MaxPool2d(2),
        glt.BatchNormAct2d(3, activation="gelu"),
        glt.LPPool2d(2, 2),
        glt.ActivationDropout("silu", 0.1, order="before"),
    )


def test_copies_keep_types_and_generators():
    original = model()
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original)), torch.load(file, weights_only=False)):
        assert [type(one) for one in copied] == [type(one) for one in original]
        assert copied[1].generator.get_state() == {"seed": 5, "offset": 7}
        assert copied[1].generator is not original[1].generator
        assert repr(copied) == repr(original)


def test_what_torch_has_none_of_shows_itself():
    assert repr(glt.DropPath(0.1)) == "DropPath(p=0.1)"
    assert repr(glt.DropoutAdd()) == "DropoutAdd(p=0.5)"
    assert repr(glt.ActivationDropout("gelu", order="before")) == (
        "ActivationDropout(activation='gelu', p=0.5, order='before')"
    )
    assert repr(glt.BatchNormAct2d(4)) == repr(glt.BatchNorm2d(4)).replace("BatchNorm", "BatchNormAct")[:-1] + (
        ", activation='relu')"
    )
    assert not isinstance(glt.BatchNormAct2d(4), nn.modules.batchnorm._BatchNorm)


def test_state_dicts_of_batch_norm_act_load_both_ways():
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(4), glt.BatchNormAct2d(4)
    theirs(torch.randn(2, 4, 3, 3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.num_batches_tracked == 1
    nn.BatchNorm2d(4).load_state_dict(ours.state_dict(), strict=True)
    # From before batches were counted, which the metadata tells.
    old = {key: value for key, value in theirs.state_dict().items() if key != "num_batches_tracked"}
    ours.load_state_dict(old, strict=True)
    state = theirs.state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: glt.BatchNorm2d(3, activation="relu"), TypeError, "BatchNormAct2d"),
        (lambda: glt.BatchNormAct2d(3, activation="softmax"), ValueError, "activation must be one of"),
        (lambda: glt.Dropout(1.5), ValueError, "has to be between 0 and 1, but got 1.5"),
        (lambda: glt.DropPath(-0.1), ValueError, "has to be between 0 and 1, but got -0.1"),
        (lambda: glt.DropPath(float("nan")), ValueError, "has to be between 0 and 1"),
        (lambda: glt.Dropout(generator=torch.Generator()), TypeError, "gpu_layers.Generator"),
        (lambda: glt.ActivationDropout("relu", order="both"), ValueError, "order"),
        (lambda: glt.MaxPool2d(2, channels_last=True), TypeError, "channels_last"),
        (lambda: glt.BatchNorm2d(3)(torch.ones(2, 3, 4)), ValueError, r"expected 4D input \(got 3D input\)"),
        (
            lambda: glt.BatchNormAct1d(3)(torch.ones(2, 3, 4, 5)),
            ValueError,
            r"expected 2D or 3D input \(got 4D input\)",
        ),
        (
            lambda: glt.BatchNorm1d(3)(torch.ones(1, 3)),
            ValueError,
            "Expected more than 1 value per channel when training",
        ),
        (
            lambda: glt.BatchNorm2d(4)(torch.ones(2, 3, 2, 2)),
            RuntimeError,
            "running_mean should contain 3 elements not 4",
        ),
        (lambda: glt.BatchNorm2d(3)(torch.ones(2, 3, 2, 2).double()), RuntimeError, "dtype"),
        (lambda: glt.BatchNormAct2d(3)(torch.ones(2, 3, 2, 2), torch.ones(2, 3, 2, 1)), ValueError, "residual"),
        (lambda: glt.BatchNormAct2d(3)(torch.ones(2, 3, 2, 2), torch.ones(2, 3, 2, 2).half()), TypeError, "residual"),
        (lambda: glt.BatchNorm2d(3)([1.0]), TypeError, "must be a torch.Tensor"),
        (lambda: glt.MaxPool2d(2)("x"), TypeError, "must be a torch.Tensor"),
        (lambda: glt.AvgPool2d(2)(torch.ones(1, 2, 4, 4, dtype=torch.int64)), TypeError, "float16, bfloat16"),
        (lambda: glt.Dropout()(torch.ones(2, dtype=torch.complex64)), TypeError, "float16, bfloat16"),
        (lambda: glt.MaxPool2d(2)(torch.ones(1, 2, 4, 4).to_sparse()), RuntimeError, "dense"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_bad_input_leaves_the_statistics():
    layer = glt.BatchNormAct2d(3)
    with pytest.raises(ValueError, match="residual"):
        layer(torch.ones(2, 3, 2, 2), torch.ones(1))
    assert layer.num_batches_tracked == 0
    assert layer.running_var.tolist() == [1, 1, 1]


def test_what_is_not_finite_can_be_left_out_of_the_statistics():
    x = torch.randn(4, 3, 5, 5)
    poisoned = x.clone()
    poisoned[1, 2, 0, 0] = float("inf")
    layer, expected = glt.BatchNorm2d(3), nn.BatchNorm2d(3)
    layer.skip_nonfinite = True
    for batch in (poisoned, x):
        layer(batch)
    expected(x)
    torch.testing.assert_close(layer.running_mean, expected.running_mean)
    torch.testing.assert_close(layer.running_var, expected.running_var)
    assert layer.num_batches_tracked == 1
    assert "skip" not in repr(layer)


META = [
    ("Dropout", (0.5,), (2, 3, 8, 9)),
    ("Dropout2d", (0.5,), (2, 3, 8, 9)),
    ("AlphaDropout", (0.5,), (2, 3, 8, 9)),
    ("BatchNorm2d", (3,), (2, 3, 8, 9)),
    ("BatchNorm3d", (3,), (2, 3, 8, 9, 4)),
    ("MaxPool2d", (3, 2, 1, 1, True), (2, 3, 8, 9)),
    ("AvgPool2d", (2,), (2, 3, 8, 9)),
    ("AdaptiveMaxPool2d", ((3, 2), True), (2, 3, 8, 9)),
    ("AdaptiveAvgPool2d", (2,), (2, 3, 8, 9)),
    ("LPPool2d", (2, 2), (2, 3, 8, 9)),
    ("MaxPool1d", (2,), (3, 9)),
]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("name", "arguments", "shape"), META)
def test_meta_tensors_have_torchs_shapes_and_strides(name, arguments, shape, last):
    x = torch.empty(shape, device="meta")
    if last and len(shape) > 3:
        x = x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    x.requires_grad_()
    ours, theirs = (getattr(lib, name)(*arguments).to("meta")(x) for lib in (glt, nn))
    for y, z in zip(*((one if isinstance(one, tuple) else (one,)) for one in (ours, theirs)), strict=True):
        assert (y.shape, y.dtype, y.stride(), y.device) == (z.shape, z.dtype, z.stride(), z.device)
    first(ours).sum().backward()
    assert x.grad.is_meta


def test_half_under_autocast():
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layer in (glt.BatchNorm2d(3), glt.AvgPool2d(2), glt.MaxPool2d(2), glt.Dropout(), glt.LPPool2d(2, 2)):
            assert layer(x).dtype is torch.bfloat16
        for layer in (glt.BatchNormAct2d(3), glt.DropoutAdd()):
            assert layer(x, torch.randn(2, 3, 8, 8)).dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["BatchNorm2d", "MaxPool2d", "Dropout"])
def test_other_devices_are_named(name):
    class Elsewhere(torch.Tensor):
        device = torch.device("mps")
        is_cpu = False

    layer = getattr(glt, name)(3) if name != "Dropout" else glt.Dropout()
    with pytest.raises(RuntimeError, match=r"mps.*revert"):
        layer(torch.ones(2, 3, 4, 4).as_subclass(Elsewhere))


def functionals():
    """Names of the functions that both libraries have, as torch.nn.functional says."""
    kinds = ("dropout", "max_pool", "avg_pool", "lp_pool", "max_unpool", "batch_norm")
    return [
        name
        for name in dir(nn.functional)
        if any(kind in name for kind in kinds) and not name.startswith(("_", "fractional_"))
    ]


@pytest.mark.parametrize("name", functionals())
def test_arguments_of_functions_are_torchs(name):
    ours, theirs = getattr(glt.functional, name), getattr(nn.functional, name)
    assert name in glt.functional.__all__
    try:
        expected = inspect.signature(theirs).parameters
    except ValueError:  # written in C++, which says it in words
        words = theirs.__doc__.strip().partition("(")[2].partition(")")[0].split(", ")
        expected = dict.fromkeys(word.partition("=")[0] for word in words)
    if "args" in expected:  # one of two functions, by return_indices
        expected = inspect.signature(getattr(nn.functional, f"{name}_with_indices")).parameters
    found = inspect.signature(ours).parameters
    added = [one for one in found if one not in expected]
    assert added == {"batch_norm": ["residual", "activation"]}.get(name, ["generator"] if "dropout" in name else [])
    assert list(found)[: len(expected)] == list(expected)
    assert all(found[one].kind is inspect.Parameter.KEYWORD_ONLY for one in added)
    for one, parameter in expected.items():
        assert parameter is None or found[one].default == parameter.default


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("name", "argument"), [("max_pool", 2), ("adaptive_max_pool", 3)])
def test_pools_with_indices(name, argument, rank):
    x = torch.randn(2, 3, *(7, 5, 4)[:rank])
    function = f"{name}{rank}d_with_indices"
    found, expected = (getattr(lib, function)(x, argument) for lib in (glt.functional, nn.functional))
    assert type(found) is tuple
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_parameters_and_buffers_can_be_resized_afterwards(training):
    # As FSDP does; torch refuses it of memory that NumPy has seen.
    cumulative = glt.BatchNorm2d(3, momentum=None)
    for layer in (glt.BatchNorm2d(3), cumulative, glt.BatchNormAct2d(3, bias=False), glt.BatchNorm2d(3).bfloat16()):
        layer.train(training)
        layer(torch.randn(2, 3, 4, 4, dtype=layer.weight.dtype, requires_grad=True)).sum().backward()
        for parameter in (*layer.parameters(), *layer.buffers()):
            parameter.untyped_storage().resize_(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "layer",
    [
        *(glt.MaxPool2d(1), glt.AvgPool2d(1), glt.LPPool2d(1, 1), glt.AdaptiveMaxPool2d(4), glt.AdaptiveAvgPool2d(4)),
        *(glt.Dropout(0.0), glt.Dropout2d(0.0), glt.AlphaDropout(0.0), glt.DropPath(0.0)),
        *(glt.ActivationDropout("relu", 0.0), glt.ActivationDropout(None, 0.0), glt.DropoutAdd(0.0)),
    ],
)
def test_results_that_equal_an_input_have_memory_of_their_own(layer, dtype):
    # The reference sees addresses only: nothing but the caller keeps that memory alive.
    x = values((2, 3, 4, 4), dtype).requires_grad_()
    y = layer(x, x.detach()) if isinstance(layer, glt.DropoutAdd) else layer(x)
    dy = values((2, 3, 4, 4), dtype, 1)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert len({one.untyped_storage().data_ptr() for one in (x, y, dy, dx)}) == 4


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_can_be_resized_afterwards(backend, dtype):
    # As a buffer that batches of several sizes are collected in.
    layers = [glt.Dropout(), glt.ActivationDropout("relu"), glt.DropoutAdd(), glt.BatchNormAct2d(3).to(dtype)]
    layers += [glt.MaxPool2d(2), glt.AvgPool2d(2), glt.LPPool2d(2, 2), glt.Dropout(inplace=True)]
    with gl.use_backend(backend):
        for layer in layers:
            x, dy = values((2, 3, 4, 4), dtype), values((2, 3, 4, 4), dtype)[:, :, ::2, ::2]
            residuals = [x] if isinstance(layer, (glt.DropoutAdd, glt.BatchNormAct2d)) else []
            y = layer(x * 1 if layer.__dict__.get("inplace") else x.requires_grad_(), *residuals)
            if y.requires_grad:
                y.backward(dy if y.shape == dy.shape else x.detach())
            for one in (x, dy):
                one.untyped_storage().resize_(0)
