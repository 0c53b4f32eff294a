"""What importing the library brings in: NumPy and ml_dtypes, and nothing that a user may not have."""

import subprocess
import sys


def absent(*packages):
    """Code before which these packages cannot be imported."""
    return f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


NO_CUPY = absent("cupy", "cupyx", "cupy_backends", "torch", "sklearn", "matplotlib")
USE = """
import numpy as np
import gpu_layers as gl

layer = gl.BatchNorm2d(2)
x = np.arange(16.0, dtype="float32").reshape(2, 2, 2, 2)
y = gl.MaxPool2d(2)(gl.Dropout(0.0)(gl.ReLU()(layer(x))))
assert y.shape == (2, 2, 1, 1) and np.isfinite(y).all()
layer.to("cpu")
"""


def run(code):
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_library_works_without_what_is_optional():
    run(NO_CUPY + USE)


def test_a_missing_cupy_is_explained_where_it_is_asked_for():
    run(
        NO_CUPY
        + USE
        + """
for ask in (lambda: layer.to("cuda"), gl.use_backend("cuda").__enter__):
    try:
        ask()
    except RuntimeError as error:
        assert "needs CuPy" in str(error) and "pip install 'gpu-layers[cuda" in str(error), error
    else:
        raise AssertionError("no error")
"""
    )


def test_nothing_optional_is_imported_even_where_it_is_installed():
    loaded = run(USE + "\nprint(*sys.modules, sep='\\n')".replace("sys", "__import__('sys')")).split()
    assert "numpy" in loaded
    assert not {"cupy", "torch", "sklearn", "matplotlib", "safetensors", "rich"} & set(loaded)
