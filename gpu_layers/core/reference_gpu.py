"""The GPU that plans are made for, whatever GPU runs them: so that one shape has the same bits on all of them.

It has the numbers of NVIDIA's H100 (Hopper tuning guide; CUDA C++ programming guide, compute capability 9.0).
"""

MULTIPROCESSORS = 132
#: Warps that a multiprocessor holds at most; batch norm and elementwise kernels fill it with blocks of eight.
WARPS = 64
WARP_THREADS = 32
#: Shared memory of a multiprocessor, and what the system takes of it for each block.
SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024
