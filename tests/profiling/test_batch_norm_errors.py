"""The errors of batch norm are no larger than docs/batch_norm.md says, beside PyTorch's."""

import re
from pathlib import Path

from tests.statistical.batch_norm_errors import rows

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "batch_norm.md").read_text(encoding="utf-8")


def test_the_table_is_true():
    documented = {
        cells[0]: [float(cell) for cell in cells[1:]]
        for line in re.findall(r"^\| ((?:float|bfloat).*) \|$", DOCUMENT, re.MULTILINE)
        for cells in [line.split(" | ")]
    }
    measured = {f"{row.dtype}, {row.data}": row for row in rows()}
    assert documented.keys() == measured.keys()
    for name, row in measured.items():
        for error, (ours, theirs) in zip(
            row.ours, zip(documented[name][::2], documented[name][1::2], strict=True), strict=True
        ):
            # Of the order that is documented, whatever order sums have.
            assert error <= 2 * ours, name
            # Where ours is the larger one, it is by a few roundings: under 1e-6.
            assert ours <= theirs + 1e-6, name
        # The promise: the variance keeps at least four digits, whatever the mean.
        assert row.ours[2] < 1e-4
