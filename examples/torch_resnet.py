"""A ResNet-50-shaped network on the digits, before and after ``glt.convert``: the same training, fewer bytes kept."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import gpu_layers.torch as glt


def bottleneck(channels: int, width: int, stride: int) -> nn.Module:
    """1x1, 3x3, 1x1: each with batch norm, as in He et al., 2016, figure 5."""

    def step(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]

    body = nn.Sequential(
        *step(channels, width, 1), nn.ReLU(), *step(width, width, 3, stride), nn.ReLU(), *step(width, 4 * width, 1)
    )
    same = stride == 1 and channels == 4 * width
    return Residual(body, nn.Identity() if same else nn.Sequential(*step(channels, 4 * width, 1, stride)))


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.relu = body, shortcut, nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the branch to the shortcut."""
        return self.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 8, classes: int = 10) -> nn.Module:
    """The 50 layers, at a width that a CPU can train; dropout before the last one."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 1, 1))
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            size = width * 2**stage
            layers.append(bottleneck(channels, size, 2 if block == 0 and stage else 1))
            channels = 4 * size
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, classes))


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


def main(steps: int = 20, batch: int = 32) -> tuple[int, int]:
    """Convert, train, and print the loss and the bytes before and after."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    model = resnet()
    before = bytes_kept(model, images[:batch])
    glt.convert(model, fuse=True)
    after = bytes_kept(model, images[:batch])
    print(f"kept for backward: {before:,} bytes with torch.nn, {after:,} after convert: {after / before:.2f} of it")
    for name, (theirs, ours) in by_layer().items():
        print(f"  {name}, beside its input: {theirs:.2f} bytes a value with torch.nn, {ours:.2f} after convert")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(steps):
        rows = torch.randint(len(labels), (batch,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        if step % 5 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")
    return before, after


if __name__ == "__main__":
    main()
