"""The documents are true: their Python runs and prints what it says, commands and links exist, tables are whole."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import gpu_layers as gl
from gpu_layers.cli.entry import _parser

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
PAGES = [
    *READMES,
    "gpu_layers/emulator/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")

#: What a page's code begins with, where it speaks of something that the reader has.
BEFORE = {
    "docs/torch.md": "import torch\nmodel = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))\n"
}
#: A block with one of these needs a GPU; all others run on NumPy arrays, if they are told to.
OF_GPUS = re.compile(r"\bcp\.cuda\b|\bgl\.capture\(")

every_page = pytest.mark.parametrize("page", PAGES)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def on_numpy(block):
    return block.replace("import cupy as cp", "import numpy as cp").replace('.to("cuda")', "")


def without_code(text):
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def run(page, blocks, capsys, folder, monkeypatch):
    """Execute the blocks in order, in one namespace: a page is read from top to bottom."""
    monkeypatch.chdir(folder)
    names = {"__name__": "page"}
    exec(BEFORE.get(page, ""), names)
    capsys.readouterr()
    for block in blocks:
        exec(compile(block, page, "exec"), names)
        expected = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.MULTILINE)
        printed = capsys.readouterr().out.splitlines()
        assert printed == expected or not expected, page


@every_page
@pytest.mark.filterwarnings("error")
def test_code_that_needs_no_gpu(page, capsys, tmp_path, monkeypatch):
    blocks = [on_numpy(block) for block in blocks_of(page) if not OF_GPUS.search(block)]
    run(page, blocks, capsys, tmp_path, monkeypatch)


@pytest.mark.gpu
@every_page
def test_all_code(page, capsys, tmp_path, monkeypatch):
    run(page, blocks_of(page), capsys, tmp_path, monkeypatch)


@every_page
def test_all_code_is_python(page):
    for block in blocks_of(page):
        compile(block, page, "exec")


def test_the_readmes_have_one_program_that_runs_on_numpy_as_they_say():
    (block,), (other,) = map(blocks_of, READMES)
    assert block == other
    assert not OF_GPUS.search(block)


#: Layers of the array library's products, and of other layers: they have no kernels here.
WITHOUT_KERNELS = {"Layer", "Sequential", "Flatten", "Linear", "Conv2d"}


@pytest.mark.parametrize("page", READMES)
def test_the_table_names_every_layer(page):
    rows = re.findall(r"^\| [^`|]+ \| (`\w+`(?:, `\w+`)*) \| \[", text_of(page), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    layers = {
        name for name in gl.__all__ if isinstance(getattr(gl, name), type) and issubclass(getattr(gl, name), gl.Layer)
    }
    assert sorted(names) == sorted(layers)
    assert layers >= WITHOUT_KERNELS


def test_the_tables_of_operations_name_every_pair():
    """What an operation saves is said on its family's page."""
    pages = "\n".join(text_of(f"docs/{family}.md") for family in ("dropout", "batch_norm", "pooling", "operations"))
    tables = re.findall(r"`(\w+)`", "\n".join(line for line in pages.splitlines() if "Saved`" in line))
    pairs = {name for name in gl.ops.__all__ if name.endswith(("_forward", "_inference", "_backward", "Saved"))}
    assert pairs - {"batch_norm_double_backward"} == set(tables) & pairs


@pytest.mark.parametrize("page", READMES)
def test_the_readmes_are_short(page):
    assert len(text_of(page).splitlines()) <= 120


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_lines_of_prose_are_short(page):
    prose = [
        line for line in without_code(text_of(page)).splitlines() if not line.startswith(("|", "![", "[!", "    "))
    ]
    # A Chinese character is as wide as two letters.
    width = {line: len(line) + sum(ord(letter) > 0x2E7F for letter in line) for line in prose}
    assert [line for line in prose if width[line] > 100 and "](" not in line] == []


def anchors(text):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page))):
        target, _, anchor = link.partition("#")
        if "://" in link or target.startswith("../../actions/"):  # of the repository's site
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            wrong.append(link)
    assert wrong == []


COMMAND = re.compile(r"^    (?:mpirun -n \d+ )?gpu-layers (.*)$|`gpu-layers ([a-z][^`]*)`", re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_commands_are_understood(page):
    for match in COMMAND.finditer(text_of(page)):
        words = shlex.split(match[1] or match[2], comments=True)
        if "--help" not in words and "info" not in words[1:]:
            _parser().parse_args(words)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_modules_and_targets_are_there(page):
    text = text_of(page)
    for module in set(re.findall(r"python -m ((?:profiling|tests|gpu_layers)[\w.]*)", text)):
        assert importlib.util.find_spec(module), module
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)) <= set(targets.split())
