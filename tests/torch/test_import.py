"""What importing the package brings in, and says."""

import gpu_layers.torch as glt
from tests.test_import import absent, run


def test_neither_cupy_nor_inductor_nor_a_warning():
    code = """
import sys, torch, gpu_layers.torch as glt
x = torch.ones(2, 3, 4, 4, requires_grad=True)
glt.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.MaxPool2d(2), torch.nn.Dropout()))(x).sum().backward()
print(*sys.modules, sep="\\n")
"""
    loaded = run(code).split()
    assert "gpu_layers.torch" in loaded
    assert not {"cupy", "torch._inductor", "gpu_layers.runtime.emulation"} & set(loaded)


def test_a_missing_torch_is_named():
    run(
        absent("torch")
        + """
import gpu_layers
try:
    import gpu_layers.torch
except ImportError as error:
    assert "PyTorch" in str(error) and "pip install torch" in str(error), error
else:
    raise AssertionError("no error")
"""
    )


def test_public_names():
    assert sorted(glt.__all__) == sorted(set(glt.__all__))
    assert all(hasattr(glt, name) for name in glt.__all__)
    assert all(hasattr(glt.functional, name) for name in glt.functional.__all__)
