"""Debug a CUDA kernel of your own on a CPU: the emulator finds its race, and shows that the repair is right.

It needs g++ and the CUDA headers, no GPU. Run it: python examples/emulate_my_kernel.py
"""

import tempfile
from pathlib import Path

import numpy as np

from gpu_layers import emulator
from gpu_layers.emulator import ALL_SCHEDULES, EmulationError

# The sum of each block's 256 values. In the loop a thread reads what another one wrote in the turn before.
SOURCE = """
template <bool Repaired>
__global__ void block_sum(const float* x, float* sums) {
    __shared__ float values[256];
    values[threadIdx.x] = x[256 * blockIdx.x + threadIdx.x];
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
        if (Repaired) __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = values[0];
}
"""


def launch(module, kernel, x, **options):
    sums = np.empty(len(x) // 256, np.float32)
    trace = module.launch(kernel, (len(sums),), (256,), [x, sums], argument_names=("x", "sums"), **options)
    return sums, trace


def main():
    x = np.arange(4 * 256, dtype=np.float32)
    expected = x.reshape(4, 256).sum(axis=1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "block_sum.cu"
        source.write_text(SOURCE)
        module = emulator.load(source, ["block_sum<false>", "block_sum<true>"], mode="trace")

        # Checked mode knows what orders accesses, so it finds the race whatever order the threads ran in.
        found = None
        try:
            launch(module, "block_sum<false>", x)
        except EmulationError as error:
            found = error
        print(f"{type(found).__name__}: {found}\n")

        for schedule in ALL_SCHEDULES:
            sums, trace = launch(module, "block_sum<true>", x, schedule=schedule)
            assert (sums == expected).all()
        print(f"repaired: right under {len(ALL_SCHEDULES)} orders of threads and blocks")
        shared = trace.total("shared")
        print(f"shared memory: {shared.requests} requests, {shared.bank_conflicts} bank conflicts")
        print(f"x: {trace.total('x', 'load').bytes} bytes read, {trace.footprints['x'].bytes_loaded} of them distinct")
    return found, sums


if __name__ == "__main__":
    main()
