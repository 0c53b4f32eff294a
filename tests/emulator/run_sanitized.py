"""Runs one kernel of ``sanitized.cu`` in this process. Started by the tests, as

python -m tests.emulator.run_sanitized MODE KERNEL
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np

from gpu_layers import emulator

NAMES = [
    "block_sum",
    "read_past_the_end",
    "write_before_the_start",
    "dynamic_shared_overrun",
    "local_overrun",
    "signed_overflow",
    "wide_shift",
    "overrun_in_a_struct",
]


def main(mode: str, kernel: str) -> None:
    source = pathlib.Path(__file__).parent / "kernels" / "sanitized.cu"
    module = emulator.load(source, NAMES, mode=mode)
    x, y = np.ones(512, np.float32), np.zeros(512, np.float32)
    counts = np.zeros(1, np.int32)
    if kernel == "block_sum":
        for schedule in emulator.ALL_SCHEDULES:
            module.launch(kernel, (2,), (256,), [x, y], schedule=schedule)
            assert (y[:2] == 256).all(), y
        # A launch that ends in an error leaves fibres behind in mid-flight; the next one must not mind.
        try:
            module.launch(kernel, (2,), (250,), [x, y])
        except emulator.EmulationError as error:
            print(type(error).__name__)
        module.launch(kernel, (2,), (256,), [x, y])
    elif kernel == "read_past_the_end":
        module.launch(kernel, (1,), (32,), [x[:32], y[:32], np.int32(1)])
    elif kernel == "write_before_the_start":
        module.launch(kernel, (1,), (32,), [y[8:]])
    elif kernel == "dynamic_shared_overrun":
        module.launch(kernel, (1,), (1,), [y, np.int32(100)], shared_bytes=100)
    elif kernel == "local_overrun":
        module.launch(kernel, (1,), (1,), [np.array([0, 1, 2, 4], np.int32), counts])
    elif kernel == "signed_overflow":
        module.launch(kernel, (1,), (1,), [np.array([1 << 20, 1 << 20], np.int32), counts])
    elif kernel == "wide_shift":
        module.launch(kernel, (1,), (1,), [np.array([40], np.int32), counts])
    elif kernel == "overrun_in_a_struct":
        table = np.zeros((), np.dtype([("count", np.int32), ("values", np.int32, 4)]))
        module.launch(kernel, (1,), (1,), [table, np.array([-1], np.int32), counts])
    print("clean")


if __name__ == "__main__":
    main(*sys.argv[1:])
