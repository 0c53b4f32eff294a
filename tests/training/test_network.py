"""The network that is trained on images."""

import numpy as np
import pytest

from gpu_layers.training.network import dropout_generators, image_classifier
from tests.inputs import normal


@pytest.mark.parametrize("placement", ["after", "before"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 9), (2, 5, 4)])
def test_image_classifier_takes_any_image(shape, placement):
    dtype = np.dtype(np.float32)
    network = image_classifier(shape, 3, p=0.5, placement=placement, seed=4, dtype=dtype)
    names = [type(layer).__name__ for layer in network.layers]
    pair = ["ReLU", "Dropout"] if placement == "after" else ["Dropout", "ReLU"]
    assert names[:5] == names[5:10] == ["Conv2d", "BatchNorm2d", *pair, "MaxPool2d"]
    assert names[10:] == ["Flatten", "Linear", "BatchNorm1d", *pair, "Linear"]
    x = normal((4, *shape), np.float32)
    y = network(x)
    assert y.shape == (4, 3)
    assert network.backward(y).shape == x.shape


def test_each_dropout_layer_has_a_stream_of_its_own():
    network = image_classifier((1, 8, 8), 10, p=0.5, placement="after", seed=4, dtype=np.dtype(np.float32))
    generators = dropout_generators(network)
    assert len({generator.seed for generator in generators}) == 3
    network(normal((2, 1, 8, 8), np.float32))
    assert [generator.offset for generator in generators] == [1, 1, 1]
