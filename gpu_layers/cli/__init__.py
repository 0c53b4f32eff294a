"""The command ``gpu-layers``."""

from gpu_layers.cli.entry import command, main

__all__ = ["command", "main"]
