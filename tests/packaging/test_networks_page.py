"""The page about networks: its code runs, from top to bottom."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "networks.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("error")
def test_the_code_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    names = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    assert "0.norms.1.running_var" in names["network"].state_dict()


def test_lines_of_prose_are_short():
    prose = re.sub(r"^```python\n.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 105] == []
