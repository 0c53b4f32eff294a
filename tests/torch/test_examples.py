"""The examples run, and show what they say; the command that measures the host's overhead."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from profiling import torch_overhead

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    # As when the file is run: one finds the other.
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def test_passes_differ_more_where_nothing_was_learned(capsys):
    spread = example("torch_mc_dropout").main()
    assert 0 < spread["inside"] < spread["outside"]
    assert "outside" in capsys.readouterr().out


def test_less_is_kept_after_convert(capsys):
    pytest.importorskip("sklearn")
    module = example("torch_resnet")
    before, after = module.main(steps=1, batch=4)
    assert after < before
    assert "kept for backward" in capsys.readouterr().out


def test_what_layers_keep_beside_their_input(capsys):
    example("torch_memory").main()
    assert len(capsys.readouterr().out.splitlines()) == 3
    found = example("torch_memory").by_layer()
    # On the CPU torch's mask is of the input's dtype; a seed, and five numbers of a channel, are next to nothing.
    expected = {"Dropout": (4, 0), "MaxPool2d": (8, 1), "BatchNorm2d, ReLU": (4, 0)}
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair, abs=0.01)


def test_a_block_without_convolutions_keeps_a_fraction():
    # Dropout and max pooling between layers that keep nothing themselves: 1 byte a pooled value in place of the input
    # (4 bytes a value), indices (8 bytes a pooled value) and a mask (4 bytes a value, on the CPU).
    bytes_kept = example("torch_memory").bytes_kept
    glt = pytest.importorskip("gpu_layers.torch")
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout(), torch.nn.MaxPool2d(2))
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    pooled = 2 * 3 * 8 * 8
    assert bytes_kept(model, x) >= pooled * 8 + 2 * 4 * x.numel()
    # Two seeds beside the taps.
    assert bytes_kept(glt.convert(model), x) == pooled + 16


def test_the_overhead_command_prints_a_row_a_layer(capsys):
    assert torch_overhead.main(["--rounds", "1", "--calls", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:]] == [name for name, _ in torch_overhead.LAYERS]
    assert torch_overhead.main(["--rounds", "1", "--calls", "2", "--limit", "0.01"]) == 1
