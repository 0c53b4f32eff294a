"""A run with made-up numbers, of the shape that a real one has."""

import zlib

from gpu_layers.catalogue import OPERATIONS
from profiling.cases import all_cases
from profiling.results import Row, Run
from profiling.timing import Timing


def sample_run(kind="measured"):
    """Every case; rates depend on its name alone."""
    rows = []
    for case in all_cases(OPERATIONS, ("bfloat16", "float32")):
        row = Row.of(case, correct=True, error=0.1)
        for name, slower in {
            "ours": 1.0,
            "copy": 0.93,
            "torch": 1.6,
            "torch.compile": 1.3,
            "jax": 1.5,
            "cupy": 6,
        }.items():
            noise = 1 + zlib.crc32(f"{case}{name}".encode()) % 100 / 600
            time = (3.0 + row.floor_bytes / 2.9e6) * slower * noise
            row.timings[name] = Timing(time, time * 0.98, time * 1.03, 40)
        rows.append(row)
    facts = {"gpu": "Made-up GPU", "driver": "1.2", "cuda": "13.0", "cupy": "14", "torch": "2", "commit": "0123abc"}
    return Run(kind, facts | {"date": "2026-01-02T03:04:05Z"}, 3000.0, rows)
