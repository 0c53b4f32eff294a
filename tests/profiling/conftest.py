"""One thread for PyTorch: on toy sizes more only wait for each other."""

import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
