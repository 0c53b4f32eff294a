"""Models converted and back."""

import copy
import math

import pytest
import torch
from torch import nn

import gpu_layers.torch as glt
from gpu_layers.torch.modules import COUNTERPARTS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.body(x)) + x)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        Block(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def test_everything_covered_changes_in_place():
    net = model()
    net[1].register_forward_hook(lambda *_: None)
    net[3].note = "kept"
    before = {name: id(module) for name, module in net.named_modules()}
    tensors = {name: id(one) for name, one in (*net.named_parameters(), *net.named_buffers())}
    state = copy.deepcopy(net.state_dict())
    assert glt.convert(net.eval()) is net
    assert {name: id(module) for name, module in net.named_modules()} == before
    assert {name: id(one) for name, one in (*net.named_parameters(), *net.named_buffers())} == tensors
    assert [type(one) for one in (net[1], net[3], net[4].norm, net[4].body[3])] == [
        glt.BatchNorm2d,
        glt.MaxPool2d,
        glt.BatchNorm2d,
        glt.Dropout,
    ]
    assert not net[1].training
    assert net[3].note == "kept"
    assert len(net[1]._forward_hooks) == 1
    net.load_state_dict(state)
    types = [type(module) for module in net.modules()]
    glt.convert(net)
    assert [type(module) for module in net.modules()] == types
    glt.revert(net)
    assert [type(module) for module in net.modules()] == [type(module) for module in model().modules()]


@pytest.mark.parametrize("theirs", list(COUNTERPARTS), ids=lambda one: one.__name__)
def test_the_root_of_every_class(theirs):
    arguments = {"BatchNorm": (3,), "Drop": (), "Feature": (), "Alpha": (), "LP": (2, 2), "Adaptive": (2,)}
    given = next((value for key, value in arguments.items() if theirs.__name__.startswith(key)), (2,))
    module = theirs(*given)
    expected = repr(module)
    assert type(glt.convert(module)) is getattr(glt, theirs.__name__)
    assert repr(module) == expected
    assert type(glt.revert(module)) is theirs


def test_the_same_results_before_and_after():
    net, x = model(), torch.randn(3, 3, 11, 9)
    for fuse in (False, True):
        ours = glt.convert(copy.deepcopy(net), fuse=fuse)
        theirs = copy.deepcopy(net)
        for one in (ours, theirs):
            one[4].body[3].p = 0.0
        y, z = ours(x), theirs(x)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        y.square().sum().backward(), z.square().sum().backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
        assert list(ours.state_dict()) == list(theirs.state_dict())


def test_what_is_fused():
    net = glt.convert(model(), fuse=True)
    assert isinstance(net[1], glt.BatchNormAct2d)
    assert net[1].activation == "relu"
    assert type(net[2]) is nn.Identity
    assert type(net[4].body[1]) is glt.BatchNormAct2d
    assert type(net[4].norm) is glt.BatchNorm2d
    assert type(net[4].relu) is nn.ReLU
    with pytest.raises(ValueError, match="BatchNormAct2d"):
        glt.revert(net)
    assert type(net[3]) is glt.MaxPool2d


def hooked(net):
    net[1].register_forward_pre_hook(lambda *_: None)


def hooked_relu(net):
    net[2].register_forward_hook(lambda *_: None)


def used_twice(net):
    net[4].other = net[2]


def norm_used_twice(net):
    net[4].other = net[1]


def in_between(net):
    net.insert(2, nn.Identity())


def another_activation(net):
    net[2] = nn.LeakyReLU()


@pytest.mark.parametrize("change", [hooked, hooked_relu, used_twice, norm_used_twice, in_between, another_activation])
def test_what_is_not_fused(change):
    net = model()
    change(net)
    glt.convert(net, fuse=True)
    assert type(net[1]) is glt.BatchNorm2d
    assert not any(isinstance(module, nn.Identity) for module in net[2:3]) or change is in_between


def test_what_is_left():
    class Own(nn.BatchNorm2d):
        pass

    class Chain(nn.Sequential):
        pass

    net = nn.Sequential(
        Own(3),
        nn.SyncBatchNorm(3),
        nn.LazyBatchNorm2d(),
        nn.GroupNorm(1, 3),
        nn.FractionalMaxPool2d(2, 1),
        nn.ReLU(),
        Chain(nn.BatchNorm2d(3), nn.ReLU()),
    )
    types = [type(module) for module in net[:6]]
    glt.convert(net, fuse=True)
    assert [type(module) for module in net[:6]] == types
    assert [type(module) for module in net[6]] == [glt.BatchNorm2d, nn.ReLU]
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(glt.convert(nn.BatchNorm2d(3)))) is nn.SyncBatchNorm


def test_skip():
    net = glt.convert(model(), skip=("1", nn.MaxPool2d, "4.body"))
    assert type(net[1]) is nn.BatchNorm2d
    assert type(net[3]) is nn.MaxPool2d
    assert type(net[4].body[1]) is nn.BatchNorm2d
    assert type(net[4].norm) is glt.BatchNorm2d
    net = glt.convert(model(), fuse=True, skip=[nn.ReLU])
    assert type(net[1]) is glt.BatchNorm2d
    with pytest.raises(ValueError, match=r"'5\.x'"):
        glt.convert(model(), skip=("5.x",))
    with pytest.raises(TypeError, match="names of modules"):
        glt.convert(model(), skip=(3,))


@pytest.mark.parametrize("function", [glt.convert, glt.revert, glt.fold_batch_norm])
def test_what_is_no_module(function):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        function([1])


# ---- folding


def trained(net, shape):
    torch.manual_seed(1)
    for module in net.modules():
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.running_var, 0.5, 2.0), nn.init.normal_(module.running_mean)
            if module.weight is not None:
                nn.init.uniform_(module.weight, -1.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return net.double().eval(), torch.randn(shape, dtype=torch.float64)


LAYERS = [
    (nn.Linear(5, 4), nn.BatchNorm1d(4), (3, 5)),
    (nn.Linear(5, 4, bias=False), glt.BatchNorm1d(4), (3, 5)),
    (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (3, 4, 7)),
    (nn.Conv2d(4, 6, 3, bias=False), glt.BatchNorm2d(6, affine=False), (3, 4, 7, 5)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(6, bias=False), (3, 4, 7, 5)),
    (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 3, 4, 5)),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (3, 4, 7)),
    (nn.ConvTranspose2d(4, 6, 3, 2, bias=False, groups=2), nn.BatchNorm2d(6), (3, 4, 3, 5)),
    (nn.ConvTranspose3d(4, 6, 2), glt.BatchNorm3d(6), (2, 4, 3, 4, 3)),
    (nn.Conv2d(4, 6, 3), glt.BatchNormAct2d(6, activation="gelu"), (3, 4, 7, 5)),
]


@pytest.mark.parametrize(("layer", "norm", "shape"), LAYERS, ids=lambda one: type(one).__name__)
def test_folded_layers(layer, norm, shape):
    net, x = trained(nn.Sequential(layer, norm, nn.Tanh()), shape)
    folded = glt.fold_batch_norm(net.train(), x)
    assert net.training
    net.eval()
    assert type(folded[1]) is (nn.GELU if isinstance(norm, glt.BatchNormAct2d) else nn.Identity)
    assert type(net[1]) is type(norm)
    # Sums of at most 72 products of numbers of about 1, twice: 200 roundings of 2**-53.
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=200 * 2**-53 * 8)


def test_pairs_that_only_a_trace_shows():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), glt.BatchNormAct2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), glt.BatchNormAct2d(4)
            self.shared, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            h = self.bn1(self.conv1(x))
            h = self.bn2(self.conv2(h), x)
            g = self.shared(h)
            return self.bn3(g) + g

    net, x = trained(Residual(), (2, 4, 5, 6))
    folded = glt.fold_batch_norm(net, x)
    assert type(folded.bn1) is nn.ReLU
    # A residual comes in between the norm and its activation; and who else reads the convolution's result?
    assert type(folded.bn2) is glt.BatchNormAct2d
    assert type(folded.bn3) is nn.BatchNorm2d
    torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_traced_folds_in_its_sequentials():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    net, x = trained(Branching(), (2, 4, 5, 6))
    folded = glt.fold_batch_norm(net, x)
    assert type(folded.body[1]) is nn.Identity


def test_what_cannot_be_traced_folds_what_a_run_of_the_sample_shows():
    class Branching(nn.Module):
        def __init__(self, add):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), glt.BatchNorm2d(4), glt.BatchNormAct2d(4)
            self.inner, self.linear, self.last = nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.add = add

        def forward(self, x):
            if x.sum() < -1e9:
                return x
            h = self.conv(x)
            g = self.act(self.inner(torch.tanh(self.norm(h))))
            g = self.last(self.linear(g.mean((2, 3))))
            return self.add(self, g, h)

    adds = {
        "nothing": lambda net, g, h: g,
        "its result": lambda net, g, h: g + h.mean((2, 3)),
        "its weight": lambda net, g, h: g * net.conv.weight.sum(),
        "the norm": lambda net, g, h: net.norm(g[:, :, None, None]),
        "what the norm knows": lambda net, g, h: g + net.norm.running_mean,
    }
    for reader, add in adds.items():
        net, x = trained(Branching(add), (2, 4, 5, 6))
        folded = glt.fold_batch_norm(net, x)
        assert type(folded.act) is nn.ReLU
        assert type(folded.last) is nn.Identity
        assert type(folded.norm) is (nn.Identity if reader == "nothing" else glt.BatchNorm2d)
        torch.testing.assert_close(folded(x), net(x), rtol=1e-12, atol=1e-12)


def test_what_is_not_folded():
    shared = nn.Linear(4, 4)
    nets = [
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(shared, nn.BatchNorm1d(4), shared),
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
    ]
    for net in nets:
        assert [type(one) for one in glt.fold_batch_norm(net)] == [type(one) for one in net]


def test_the_check_of_a_fold_can_fail():
    class Depends(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x):
            # Not to be traced; and no operation reads this.
            return self.body(x) + isinstance(self.body[1], nn.Identity) if x.sum() < 1e9 else x

    net, x = trained(Depends(), (3, 4))
    with pytest.raises(ValueError, match="rounding"):
        glt.fold_batch_norm(net, x)


def test_one_step_of_training_with_a_scaler_and_an_optimizer():
    net = glt.convert(model(), fuse=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for module in net.modules():
        if hasattr(module, "skip_nonfinite"):
            module.skip_nonfinite = True
    before = copy.deepcopy(net.state_dict())
    poisoned = torch.full((4, 3, 11, 9), math.inf)
    for x in (poisoned, torch.randn(4, 3, 11, 9)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(x).float().square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if x is poisoned:
            for name, value in net.state_dict().items():
                assert torch.equal(value, before[name]), name
    assert scaler.get_scale() == 2.0**9
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


def test_what_is_skipped_is_not_fused_when_converted_before():
    model = glt.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    glt.convert(model, fuse=True, skip=(nn.BatchNorm2d,))
    assert [type(one) for one in model] == [glt.BatchNorm2d, nn.ReLU]


def test_a_fused_batch_norm_is_not_left_unsynchronised_without_a_word():
    model = glt.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)), fuse=True)
    with pytest.warns(UserWarning, match="0 is a BatchNormAct2d, which is not synchronised"):
        model = glt.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[2]) is glt.SyncBatchNorm
