"""The first moments of the command ``gpu-layers``: an interrupt during the imports is one line, as it is later.

Imported before anything else of the package, which takes a part of a second. In any other program it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def is_command() -> bool:
    """Whether this process is the command: started as ``gpu-layers``, or as ``python -m gpu_layers``.

    Asked while the package is being imported: Python then calls a module that it is about to run "-m".
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":
        words = iter(sys.orig_argv[1:])
        module = next((word for word in words if word.startswith("-m")), "")
        return (module[2:] or next(words, "")) == "gpu_layers"
    # A process that multiprocessing starts is told the name of the first one, but was not started with it.
    return os.path.basename(program) == "gpu-layers" and program in sys.orig_argv  # noqa: PTH119 (imports nothing)


def end_interrupted(number: int, frame: FrameType | None) -> None:
    """End at once: nothing has been begun that would have to be put in order."""
    try:
        os.write(2, b"gpu-layers: interrupted\n")
    finally:
        os._exit(INTERRUPTED)


# Where interrupts are ignored (a shell's background job), they stay so.
if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_interrupted)
