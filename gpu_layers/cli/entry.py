"""The start of the command; every error becomes one line and an exit status."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from gpu_layers._process import INTERRUPTED, end_interrupted
from gpu_layers._version import __version__
from gpu_layers.cli import compile as compilation
from gpu_layers.cli import info, study, train, verify
from gpu_layers.cli.termination import Terminated

#: Each has a function ``add_command(commands)``, which sets ``run``, a function of the parsed arguments.
_COMMANDS = (train, study, verify, compilation, info)
_BAD_INPUT, _BROKEN_PIPE, _TERMINATED = 2, 141, 143


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
        130 interrupted, 141 when nobody reads the output any more, 143 a training run ended by SIGTERM.
    """
    _repair_streams()
    try:
        if signal.getsignal(signal.SIGINT) is end_interrupted:  # from here on there may be something to put in order
            signal.signal(signal.SIGINT, signal.default_int_handler)
        arguments = _parser().parse_args(argv)
        status = arguments.run(arguments)
        # Here a full disk under the standard output still becomes an error message.
        sys.stdout.flush()
        return status
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except BrokenPipeError:
        _silence_stdout()
        return _BROKEN_PIPE
    except Terminated as stopped:
        _complain(str(stopped))
        return _TERMINATED
    except (OSError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        _complain(f"error: {_message(error)}")
        _silence_stdout()
        return _BAD_INPUT
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED


def command() -> NoReturn:
    """The process of the command, from its arguments to its exit status."""
    status = main()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own end would answer with a traceback
    sys.exit(status)


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
    # A message may hold line breaks; the error must be one line.
    with suppress(OSError):  # then the exit status is all there is
        print("gpu-layers:", " ".join(message.split()), file=sys.stderr, flush=True)


def _repair_streams() -> None:
    """Replace streams that were closed when the process began (``>&-``), and let names in any script be printed.

    Python sets such a stream to None. The next file that is opened, such as a checkpoint, would get its number, and
    with it what libraries print.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115, PTH123 (as long as the process lives)
            try:
                os.fstat(number)
            except OSError:
                os.dup2(stream.fileno(), number)
            setattr(sys, name, stream)
    # Letters that an ASCII output lacks, and undecodable bytes of file names, are escaped, as on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    """Drop what is still buffered: at exit Python would fail to write it again, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
