"""Arithmetic without alarms."""

from __future__ import annotations

import numpy as np

#: Decorator: overflow to infinity, underflow, and NaN are results here, as they are on a GPU, not mistakes.
ieee = np.errstate(all="ignore")
