"""Tests marked slow run when they are asked for: pytest tests/statistical -m slow."""

import pytest


def pytest_collection_modifyitems(config, items):
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: ask for it with -m slow"))
