"""Names of source lines in the messages and counters of a compiled module."""

from __future__ import annotations

import os
import re


def replace_places(message: str) -> str:
    """Write ``{file:PATH:LINE}`` as ``NAME:LINE``."""
    return re.sub(r"\{file:(.*?):(\d+)\}", lambda m: f"{os.path.basename(m[1])}:{m[2]}", message)
