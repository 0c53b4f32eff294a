"""Layers: thin state around the operations of ``gpu_layers.ops``."""

from gpu_layers.layers.activation import ReLU
from gpu_layers.layers.base import Layer
from gpu_layers.layers.batch_norm import BatchNorm1d, BatchNorm2d
from gpu_layers.layers.dropout import Dropout
from gpu_layers.layers.pooling import AvgPool2d, MaxPool2d

__all__ = ["AvgPool2d", "BatchNorm1d", "BatchNorm2d", "Dropout", "Layer", "MaxPool2d", "ReLU"]
