"""Where the command starts, and where every error becomes one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from gpu_layers._version import __version__
from gpu_layers.cli import compile as compilation
from gpu_layers.cli import info, study, train, verify

#: Each has a function ``add_command(commands)``, which sets ``run``, a function of the parsed arguments.
_COMMANDS = (train, study, verify, compilation, info)
_BAD_INPUT, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        Exit status: 0 good, 1 a check failed, 2 bad usage or bad input, with one line on standard error,
        130 interrupted, 141 when nobody reads the output any more.
    """
    try:
        arguments = _parser().parse_args(argv)
        status = arguments.run(arguments)
        # Here, where a full disk behind the standard output is still an error message.
        sys.stdout.flush()
        return status
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except BrokenPipeError:
        _silence_stdout()
        return _BROKEN_PIPE
    except (OSError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        _complain(f"error: {_message(error)}")
        _silence_stdout()
        return _BAD_INPUT
    except KeyboardInterrupt:
        _complain("interrupted")
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gpu-layers",
        description="Dropout, batch normalisation and pooling as CUDA kernels, with a NumPy reference.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gpu-layers {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_command(commands)
    return parser


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return f"out of memory: {error}"
    return str(error) or type(error).__name__


def _complain(message: str) -> None:
    # A message may hold line breaks; the error is one line all the same.
    print("gpu-layers:", " ".join(message.split()), file=sys.stderr)


def _silence_stdout() -> None:
    """Let what is still buffered go nowhere: Python would fail to write it once more at exit, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
