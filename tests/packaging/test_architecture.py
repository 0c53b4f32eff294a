"""Which packages may import which: what CONTRIBUTING says of the architecture."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "gpu_layers"
ON_TOP = {"catalogue", "cli", "study", "training", "verification"}
#: Of each package the others that it may not import.
FORBIDDEN = {
    "core": {"distributed", "emulator", "kernels", "layers", "models", "ops", "reference", "runtime", "torch", *ON_TOP},
    "distributed": {"emulator", "kernels", "layers", "models", "ops", "reference", "runtime", "torch", *ON_TOP},
    "reference": {"distributed", "emulator", "kernels", "layers", "models", "ops", "runtime", "torch", *ON_TOP},
    "kernels": {"distributed", "emulator", "layers", "models", "ops", "reference", "torch", *ON_TOP},
    "runtime": {"distributed", "kernels", "layers", "models", "ops", "reference", "torch", *ON_TOP},
    "emulator": {"distributed", "kernels", "layers", "models", "ops", "reference", "runtime", "torch", *ON_TOP},
    "ops": {"emulator", "kernels", "layers", "models", "torch", *ON_TOP},
    "layers": {"emulator", "kernels", "models", "torch", *ON_TOP},
    "models": {"emulator", "kernels", "torch", *ON_TOP},
    "torch": {"emulator", *ON_TOP},
}


def imported(path):
    """Modules of this package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name.startswith("gpu_layers."))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_none_that_is_above_it(package):
    files = sorted((PACKAGE / package).rglob("*.py"))
    assert files
    found = {
        f"{path.name}: {name}"
        for path in files
        for name in imported(path)
        if name.split(".")[1] in FORBIDDEN[package] - {package}
    }
    assert not found


def test_what_importing_the_package_loads():
    program = "import sys, gpu_layers; print(*sorted(name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"cupy", "torch", "matplotlib", "sklearn", "onnx"}
    assert not {name for name in loaded if name.startswith(tuple(f"gpu_layers.{one}" for one in (*ON_TOP, "torch")))}
