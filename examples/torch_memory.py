"""What layers keep for their backward, before and after ``glt.convert``: bytes, counted as autograd saves them."""

import torch
from torch import nn

import gpu_layers.torch as glt


def bytes_kept(model: nn.Module, x: torch.Tensor, *others: torch.Tensor) -> int:
    """Bytes that a forward keeps for its backward, each memory counted once, without the parameters and the others."""
    parameters = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *others)}
    memories: dict[int, int] = {}
    alive = []  # a memory that was given back could come again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            memories[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(memories.values())


def by_layer() -> dict[str, tuple[float, float]]:
    """Bytes an output value that layers keep beside their input, of torch.nn and after ``convert``."""
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    found = {}
    for name, layers in (
        ("Dropout", [nn.Dropout()]),
        ("MaxPool2d", [nn.MaxPool2d(2)]),
        ("BatchNorm2d, ReLU", [nn.BatchNorm2d(16), nn.ReLU()]),
    ):
        model = nn.Sequential(*layers)
        values = model(x).numel()
        before = bytes_kept(model, x, x) / values
        found[name] = before, bytes_kept(glt.convert(model, fuse=True), x, x) / values
    return found


def main() -> None:
    """Print it, per layer."""
    for name, (theirs, ours) in by_layer().items():
        print(f"{name}, beside its input: {theirs:.2f} bytes per value with torch.nn, {ours:.2f} after convert")


if __name__ == "__main__":
    main()
