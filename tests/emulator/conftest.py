"""Shared tools of the emulator's tests."""

from __future__ import annotations

import functools
import pathlib

import pytest

from gpu_layers import emulator

KERNELS = pathlib.Path(__file__).parent / "kernels"


@functools.cache
def marked_line(file: str, mark: str) -> str:
    """``file:line`` of the line that ends with ``// BUG: mark``."""
    for number, line in enumerate((KERNELS / file).read_text().splitlines(), start=1):
        if line.endswith(f"// BUG: {mark}"):
            return f"{file}:{number}"
    raise LookupError(f"{file} marks no line with {mark}")


@pytest.fixture(params=emulator.ALL_SCHEDULES, ids=lambda s: s.order + ("-shuffled" if s.shuffle_blocks else ""))
def schedule(request):
    return request.param
