"""What the traffic table says that poolings keep for their backward: ours, and what PyTorch's autograd really keeps."""

import numpy as np
import pytest
import torch

from gpu_layers.verification.traffic import count, traffic_cases
from tests.inputs import normal

F = torch.nn.functional
PYTORCH = {
    "max_pool 2x2 s2": lambda x: F.max_pool2d(x, 2),
    "max_pool 3x3 s2": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg_pool 2x2 s2": lambda x: F.avg_pool2d(x, 2),
    "max_pool1d 3 s2": lambda x: F.max_pool1d(x, 3, 2, 1),
    "avg_pool1d 2 s2": lambda x: F.avg_pool1d(x, 2),
    "max_pool3d 3 s2": lambda x: F.max_pool3d(x, 3, 2, 1),
    "avg_pool3d 2 s2": lambda x: F.avg_pool3d(x, 2),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (5, 6)),
    "adaptive avg": lambda x: F.adaptive_avg_pool2d(x, (5, 6)),
    "global max": lambda x: F.adaptive_max_pool2d(x, (1, 1)),
}
CASES = {
    case.op.removesuffix(" forward"): case
    for case in traffic_cases()
    if case.op.endswith("forward") and case.layout == "NCHW" and case.dtype == np.float32 and case.shape[-1] != 56
}


@pytest.mark.parametrize("name", PYTORCH)
def test_kept_bytes(name):
    case = CASES[name]
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.from_numpy(normal(case.shape, np.float32)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = PYTORCH[name](x)
    assert sum(kept.values()) == case.torch_saved
    ours = count(case).saved
    assert ours == (y.numel() * (2 if name == "global max" else 1) if "max" in name else 0)
