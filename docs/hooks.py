"""What the site has beside the pages in this folder: files of the repository's root, examples, and the API reference.

A hook of mkdocs, named in mkdocs.yml. Links between pages are those that GitHub shows; here they are turned to where
the pages of the site are.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

#: Pages of the site that are files of the repository's root.
FROM_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "license.md",
    "README.zh-CN.md": "index.zh-CN.md",
}
#: Pictures that lie elsewhere.
PICTURES = ("profiling/results/modelled.png",)
#: Pages of the API reference: title, package, and the names that the page has; ``*`` for those of its modules.
REFERENCE = {
    "layers": ("Layers", "gpu_layers.layers", ("*",)),
    "operations": ("Operations", "gpu_layers.ops", ("*",)),
    "models": (
        "Whole models",
        "gpu_layers",
        (
            *("fuse", "fold_batch_norm", "fold_batch_norm_arrays", "recalibrate", "statistics_transaction"),
            *("load_foreign_batch_norm", "convert_sync_batch_norm", "revert_sync_batch_norm"),
            *("mc_dropout", "capture", "Graph"),
        ),
    ),
    "training": (
        "Training",
        "gpu_layers.training",
        (
            *("SGD", "Adam", "Optimizer", "softmax_cross_entropy", "Dataset", "digits", "load_npz"),
            *("Trainer", "Settings", "Progress"),
        ),
    ),
    "torch": (
        "PyTorch",
        "gpu_layers.torch",
        (
            *("convert.convert", "convert.revert", "fold.fold_batch_norm", "random.checkpoint_contexts"),
            *("modules.*", "functional.*"),
        ),
    ),
    "distributed": (
        "Several processes",
        "gpu_layers.distributed",
        ("default_communicator", "shard", "Communicator", "SingleProcess", "MpiCommunicator", "NcclCommunicator"),
    ),
    "emulator": (
        "Emulator",
        "gpu_layers.emulator",
        ("load", "EmulatedModule", "Trace", "Schedule", "ALL_SCHEDULES", "EmulationError", "sanitizer_environment"),
    ),
    "runtime": (
        "Runtime",
        "gpu_layers",
        ("use_backend", "profile_ranges", "Generator", "CudaGraphGenerator", "manual_seed", "default_generator"),
    ),
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in this folder."""
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in FROM_ROOT.items()}
    pages["examples.md"] = _examples()
    for name, (title, package, names) in REFERENCE.items():
        pages[f"api/{name}.md"] = _reference(title, package, names)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    for picture in PICTURES:
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page, as they are in the repository, to pages of the site."""
    folder = ROOT if page.file.src_uri in FROM_ROOT.values() else ROOT / "docs"
    # The state of a workflow is known to the repository's own site alone.
    markdown = re.sub(r"^\[!\[CI\]\(\S+\)\n", "", markdown, flags=re.MULTILINE)

    def turned(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if "://" in target or not target:
            return match[0]
        path = (folder / target).resolve()
        if not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("examples"):
            stem = path.stem.replace("_", "-") if path.suffix else ""
            return f"](examples.md{'#' + path.stem + 'py' if stem else ''})"
        return f"]({FROM_ROOT.get(name, name.removeprefix('docs/'))}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", turned, markdown)


def _examples() -> str:
    """Every example, with what it says of itself."""
    parts = ["# Examples", "", "`python examples/NAME.py` runs one, from a checkout."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        parts += ["", f"## {path.name}", "", ast.get_docstring(ast.parse(source)) or "", "", "```python", source, "```"]
    return "\n".join(parts)


def _reference(title: str, package: str, names: tuple[str, ...]) -> str:
    """A page with the docstrings of a package's public names."""
    paths = []
    for name in names:
        path = f"{package}.{name}"
        paths += _exported(path.removesuffix(".*")) if name.endswith("*") else [path]
    return "\n\n".join([f"# {title}", *(f"::: {path}" for path in paths)])


def _exported(package: str) -> list[str]:
    """Where the names stand that the modules of a package list in ``__all__``: without importing it, by name."""
    found = {}
    for path in (ROOT / Path(*package.split("."))).glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                found |= {name: f"{package}.{path.stem}.{name}" for name in ast.literal_eval(node.value)}
    return [found[name] for name in sorted(found)]


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings have roles of reStructuredText, such as ``:class:`Dropout```: the code is enough."""
    return re.sub(r":(?:class|func|meth|attr|data|mod|exc):(<code>)[~.]?(?:gpu_layers\.)?", r"\1", html)
