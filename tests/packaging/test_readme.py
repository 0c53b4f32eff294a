"""README.md is true: its Python runs and prints what it says, its links lead somewhere."""

import re
from pathlib import Path

import pytest

import gpu_layers as gl

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def snippet(library):
    (code,) = (code for code in SNIPPETS if code.split()[1] == library)
    return code


def check_prints_its_comments(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)


def test_numpy_snippet(capsys):
    check_prints_its_comments(snippet("numpy"), capsys)


@pytest.mark.gpu
def test_cupy_snippet(capsys):
    check_prints_its_comments(snippet("cupy"), capsys)


def test_torch_snippet(capsys):
    check_prints_its_comments(snippet("torch"), capsys)


def test_every_snippet_is_tested():
    assert len(SNIPPETS) == 3


#: Layers of the array library's products, and of other layers: they have no kernels here.
WITHOUT_KERNELS = {"Layer", "Sequential", "Flatten", "Linear", "Conv2d"}


def test_table_names_every_layer():
    done = re.findall(r"^\| (`.*) \| done \| done \| done \|$", README, re.MULTILINE)
    layers = {
        name for name in gl.__all__ if isinstance(getattr(gl, name), type) and issubclass(getattr(gl, name), gl.Layer)
    }
    assert {name for row in done for name in re.findall(r"`(\w+)`", row)} == layers - WITHOUT_KERNELS


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / document).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
