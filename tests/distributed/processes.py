"""Start this Python in several processes, as a user does: with mpirun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

#: As root, and more processes than cores: a container of two cores is enough.
_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
_FOLDERS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run_processes(count, *arguments, seconds=120):
    """The finished ``mpirun -n count python *arguments``; a test fails if it takes longer than ``seconds``."""
    mpirun = shutil.which("mpirun", path=_FOLDERS)
    assert mpirun, "mpirun was not found: install the extra test, or Open MPI"
    command = [mpirun, "--oversubscribe", "-n", str(count), sys.executable, *map(str, arguments)]
    environment = {**os.environ, **_ENVIRONMENT, "PATH": _FOLDERS, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL
    )
