"""Kernels of the tests' own, compiled for the machine that executes them."""

from pathlib import Path

from profiling.compiled_code import CompiledKernel, read_cubin

COPY = """
extern "C" __global__ void copy(const uint4* x, uint4* y) {
    const long long i = blockIdx.x * 512ll + threadIdx.x;
    const uint4 first = x[i], second = x[i + 256];
    y[i] = first;
    y[i + 256] = second;
}"""

#: Shaped as PyTorch's elementwise kernels are: 128 threads, four float32 each, of two inputs and an output.
ADD = """
extern "C" __global__ void add(const float4* x, const float4* y, float4* z, int n) {
    const int i = blockIdx.x * 128 + threadIdx.x;
    if (4 * i >= n) return;
    const float4 a = x[i], b = y[i];
    z[i] = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}"""

#: Each number goes through so many rounds of work before it is stored.
WORK = """
extern "C" __global__ void work(const uint4* x, uint4* y, int rounds) {
    const long long i = blockIdx.x * 256ll + threadIdx.x;
    uint4 value = x[i];
    for (int round = 0; round < rounds; ++round) value.x = value.x * 1664525u ^ (value.x >> 7) + round;
    y[i] = value;
}"""

#: A thread follows a chain through memory.
CHAIN = """
extern "C" __global__ void chain(const int* next, int* y, int steps) {
    int place = blockIdx.x * 32 + threadIdx.x;
    for (int step = 0; step < steps; ++step) place = next[place];
    y[blockIdx.x * 32 + threadIdx.x] = place;
}"""


def compiled(source: str, name: str, folder: Path) -> CompiledKernel:
    """The machine code of a kernel for compute capability 9.0."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, f"{name}.cu", [], [])
    nvrtc.compileProgram(program, ("--gpu-architecture=sm_90", "--std=c++17"))
    path = folder / f"{name}.cubin"
    path.write_bytes(nvrtc.getCUBIN(program) + b"\0")
    nvrtc.destroyProgram(program)
    return read_cubin(path)[name]
