"""The device of a command, for the choices ``auto``, ``cpu`` and ``cuda``."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_layers.core.cuda import require_gpu

CHOICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Device:
    """The chosen device.

    Attributes
    ----------
    name : {"cpu", "cuda"}
    note : str
        One line that says why it is not the GPU, or empty.
    """

    name: str
    note: str = ""


def choose_device(choice: str) -> Device:
    """The device for a choice.

    Parameters
    ----------
    choice : {"auto", "cpu", "cuda"}
        ``auto``: the GPU, or the CPU if there is no GPU or CuPy does not work.

    Raises
    ------
    RuntimeError
        For ``cuda`` if there is no GPU or CuPy does not work.
    """
    if choice == "cpu":
        return Device("cpu")
    try:
        require_gpu()
    except RuntimeError as error:
        if choice == "cuda":
            raise
        return Device("cpu", f"No GPU here ({' '.join(str(error).split())}): on the CPU.")
    return Device("cuda")
