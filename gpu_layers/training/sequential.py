"""Layers in a row."""

from __future__ import annotations

from typing import Any

from gpu_layers.layers.base import Layer


class Sequential(Layer):
    """Layers applied one after the other, themselves a layer.

    Parameters, gradients and buffers have the layer's position in front of their name, as in PyTorch: ``"0.weight"``.

    Parameters
    ----------
    *layers : Layer

    Raises
    ------
    TypeError
        If one is no layer.
    """

    def __init__(self, *layers: Layer) -> None:
        for layer in layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"{type(layer).__name__} is not a Layer")
        # The base's constructor would give this layer dicts of its own; here they are views of the layers' dicts.
        self.layers = list(layers)
        self.training = True
        self._saved = None

    @property
    def parameters(self) -> dict[str, Any]:  # type: ignore[override]
        """Every layer's parameters: the arrays themselves, not copies."""
        return self._prefixed("parameters")

    @property
    def gradients(self) -> dict[str, Any]:  # type: ignore[override]
        """Every layer's gradients."""
        return self._prefixed("gradients")

    @property
    def buffers(self) -> dict[str, Any]:  # type: ignore[override]
        """Every layer's buffers: running statistics."""
        return self._prefixed("buffers")

    def forward(self, x: Any) -> Any:
        """The last layer's output."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Any) -> Any:
        """Gradient of x; assigns every layer's gradients."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def train(self, mode: bool = True) -> Layer:
        """Switch all layers to training mode (or, with False, to evaluation)."""
        super().train(mode)
        for layer in self.layers:
            layer.train(mode)
        return self

    def to(self, device: str) -> Layer:
        """Move all layers to "cpu" or "cuda"; what a forward saved for backward is dropped."""
        for layer in self.layers:
            layer.to(device)
        return self

    def _prefixed(self, kind: str) -> dict[str, Any]:
        return {
            f"{position}.{name}": array
            for position, layer in enumerate(self.layers)
            for name, array in getattr(layer, kind).items()
        }

    def __repr__(self) -> str:
        lines = [f"({position}): {layer!r}" for position, layer in enumerate(self.layers)]
        body = "".join("  " + line.replace("\n", "\n  ") + "\n" for line in lines)
        return f"Sequential(\n{body})" if lines else "Sequential()"
