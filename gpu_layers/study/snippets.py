"""The few lines of code beside each claim: they run, and what they print is shown."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

from gpu_layers import random

#: What every snippet starts with.
PREAMBLE = "import numpy as np\nimport gpu_layers as gl\n\ngl.manual_seed(0)"
#: Lines that a snippet may have after it.
MOST_LINES = 5


def run_snippet(code: str) -> str:
    """Run the preamble and the code.

    Parameters
    ----------
    code : str
        Ours, not a user's.

    Returns
    -------
    str
        What it printed. The default generator is afterwards where it was.
    """
    printed = io.StringIO()
    state = random.default_generator.get_state()
    try:
        with redirect_stdout(printed):
            exec(compile(f"{PREAMBLE}\n{code}", "<snippet>", "exec"), {})
    finally:
        random.default_generator.set_state(state)
    return printed.getvalue().rstrip()
