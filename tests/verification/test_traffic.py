"""Bytes moved, counted over whole launches, against the floor."""

import numpy as np
import pytest

from gpu_layers.cli import main
from gpu_layers.verification.traffic import TrafficCase, count, traffic_cases, traffic_table

# Of all but dropout two dtypes here; all four by `gpu-layers verify --traffic`.
CASES = [
    case
    for case in traffic_cases()
    if str(case.dtype) in ("float32", "bfloat16") or "drop" in case.op or case.dtype.kind in "iu"
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_limit_of_the_floor(case):
    row = count(case)
    assert row.ratio <= case.limit, traffic_table([row])
    # Nothing can be below its floor but for sectors that two arrays share: a count that is, counts too little.
    assert row.ratio >= 0.99, traffic_table([row])
    assert row.launches == case.launches or "batch_norm" in case.op


# Bytes, by hand. Of 8 x 32 x 28 x 28 bfloat16: 401,408 and for each of three groups 5 or 6 numbers of 32 channels.
# Of 4 x 32 x 28 x 28 float32: 401,408; three quarters are valid: 2,352 positions of four sizes of 28 or 14.
FLOORS = {
    "ghost batch_norm forward bfloat16 NCHW 8x32x28x28": 2 * 401_408 + 3 * 5 * 128,
    "ghost batch_norm backward bfloat16 NHWC 8x32x28x28": 3 * 401_408 + 3 * 6 * 128,
    "sync batch_norm forward float32 NHWC 4x32x28x28": 3 * 401_408 + 14 * 128,
    "sync batch_norm sum relu backward float32 NCHW 4x32x28x28": 8 * 401_408 + 12 * 128,
    "padded batch_norm forward float32 NCHW 4x32x28x28": 301_056 + 401_408 + 5 * 128,
    "padded batch_norm backward float32 NHWC 4x32x28x28": 2 * 301_056 + 401_408 + 6 * 128,
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_of_the_variants_of_batch_norm(name):
    (case,) = (case for case in CASES if str(case) == name)
    _, floor = case.prepare()
    assert floor == FLOORS[name]


def test_elementwise_kernels_move_nothing_but_16_bytes_at_a_time():
    # Others also move the numbers of samples, 8 bytes each, or bits of a mask.
    passes = ("dropout forward", "dropout backward", "dropout of a shard", "channel", "drop path", "alpha", "feature")
    passes += ("gelu dropout", "dropout gelu")
    for case in CASES:
        if case.op.startswith(passes):
            assert count(case).widest == 1, str(case)


def test_a_wasteful_pass_is_over_the_limit(monkeypatch, capsys):
    """Reading each row anew for a kernel that strides over it would be seen: here, a floor that is too low."""
    case = next(iter(traffic_cases()))

    def stricter():
        measured, floor = case.prepare()
        return measured, floor // 2

    wasteful = TrafficCase(case.op, case.dtype, case.shape, case.layout, stricter, case.limit)
    row = count(wasteful)
    assert row.ratio == pytest.approx(2, rel=0.01)
    assert not row.is_good
    monkeypatch.setattr("gpu_layers.verification.traffic.traffic_cases", lambda: iter([wasteful]))
    assert main(["verify", "--traffic"]) == 1
    assert "OVER THE LIMIT" in capsys.readouterr().out


def test_the_command_prints_a_table(capsys):
    assert main(["verify", "--traffic", "--only", r"^relu forward float32"]) == 0
    printed = capsys.readouterr().out
    # Values that are read and written, and a bit for each.
    elements = 64 * 4096
    assert f"{2 * elements * np.dtype(np.float32).itemsize + elements // 8:,}" in printed
    assert "1.000" in printed


def test_it_does_not_go_with_other_modes(capsys):
    assert main(["verify", "--traffic", "--check"]) == 2
    assert "--traffic is counted by the emulator" in capsys.readouterr().err
