"""``python -m profiling.probe``: start an empty kernel by the driver alone, to see whether a tool can watch it.

It takes well below a second, where importing CuPy under a sanitizer takes many.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# Any GPU of compute capability 7.5 or newer takes it: the driver translates it.
_PTX = b"""
.version 6.4
.target sm_75
.address_size 64
.visible .entry gpu_layers_probe()
{
    ret;
}
"""


def start_kernel(driver: Any) -> None:
    """Load and start the kernel on the first GPU, and wait for it.

    Parameters
    ----------
    driver : ctypes.CDLL
        The driver's library.

    Raises
    ------
    RuntimeError
        If a call of the driver fails; names it.
    """

    def call(name: str, *arguments: Any) -> None:
        status = getattr(driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with error {status}")

    device, context, module, function = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    call("cuModuleLoadData", ctypes.byref(module), _PTX)
    call("cuModuleGetFunction", ctypes.byref(function), module, b"gpu_layers_probe")
    call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, None, None, None)
    call("cuCtxSynchronize")


def main() -> int:
    """Run, and say so.

    Returns
    -------
    int
        0; 2 without a driver, or if it refuses.
    """
    try:
        start_kernel(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError, RuntimeError) as error:  # no library, or one without these functions
        print(f"profiling.probe: error: {error}", file=sys.stderr)
        return 2
    print("the probe ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
