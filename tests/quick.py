"""The quick tier, ``make quick``: what a contributor runs on each change.

Two parts, chosen by measured times:

* **Parity**: of the verification's cases those that launch a kernel which none before them does, kernels of the same
  template and element type counted as one. So each kernel's source runs once in each element type, against the
  reference. The whole set varies sizes, windows, layouts and special values as well.
* **Unit tests** of the reference, operations, layers, training, the emulator's interface, documents and examples,
  without the files that take longest.

What it leaves out: compilation by NVRTC, machine code, checked memory, sanitizers, schedules, statistics, processes,
the benchmark, and what takes long. ``make test`` has them.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARITY = "tests/parity/test_cases.py"
#: Files and folders that are collected, relative to the root.
COLLECTED = (
    PARITY,
    "tests/emulator/test_launch_checks.py",
    "tests/emulator/test_samples.py",
    "tests/examples",
    "tests/kernels",
    "tests/layers",
    "tests/ops",
    "tests/packaging",
    "tests/profiling/test_readme_table.py",
    "tests/profiling/test_results.py",
    "tests/reference",
    "tests/runtime/test_host_calls.py",
    "tests/runtime/test_launch.py",
    "tests/runtime/test_launches.py",
    "tests/runtime/test_program.py",
    "tests/test_import.py",
    "tests/test_random.py",
    "tests/training",
    "tests/verification/test_comparison.py",
    "tests/verification/test_coverage.py",
)
#: Files in them that take long.
LEFT_OUT = (
    "tests/kernels/test_adaptive_pool.py",
    "tests/kernels/test_batch_norm_folding.py",
    "tests/kernels/test_batch_norm_persistent.py",
    "tests/kernels/test_fractional_pool.py",
    "tests/kernels/test_tiled_pool.py",
    "tests/layers/test_overwritten.py",
    "tests/layers/test_repeated_calls.py",
    "tests/ops/test_batch_norm_max_pool.py",
    "tests/ops/test_batch_norm_max_pool_backward.py",
    "tests/ops/test_in_place.py",
    "tests/ops/test_large_windows.py",
    "tests/ops/test_lp_pool.py",
    "tests/ops/test_pool_safety.py",
    "tests/packaging/test_checkout.py",
    "tests/packaging/test_wheel.py",
    "tests/reference/test_dropout_cost.py",
    "tests/reference/test_pooling_cost.py",
    "tests/training/test_trainer.py",
)


def arguments() -> list[str]:
    """What pytest is to collect: paths that are there."""
    return [str(ROOT / name) for name in COLLECTED if (ROOT / name).exists()]


def ignored() -> list[Path]:
    """Files that pytest is not to collect."""
    return [ROOT / name for name in LEFT_OUT]


def parity_cases() -> set[str]:
    """Names of the cases that are run."""
    from gpu_layers.verification import all_cases
    from profiling.small_run import kernels_of

    chosen, covered = set(), set()
    for case in all_cases():
        kernels = {_template_and_dtype(name) for name in kernels_of(case)}
        if not kernels <= covered:
            covered |= kernels
            chosen.add(str(case))
    return chosen


def _template_and_dtype(kernel: str) -> str:
    return kernel.split(",")[0].rstrip(">")
