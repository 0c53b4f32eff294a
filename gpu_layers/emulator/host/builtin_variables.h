// threadIdx, blockIdx, blockDim, gridDim and warpSize.
#ifndef GPU_LAYERS_EMULATOR_BUILTIN_VARIABLES_H_
#define GPU_LAYERS_EMULATOR_BUILTIN_VARIABLES_H_

#include <vector_types.h>

// The runtime rewrites these whenever another thread goes on. To one thread they never change, which is
// what const tells the compiler: it may keep them in registers, and checked builds do not trace them.
#define GPU_LAYERS_BUILTIN(name) __asm__("gpu_layers_" #name) __attribute__((visibility("hidden")))
extern const uint3 threadIdx GPU_LAYERS_BUILTIN(threadIdx);
extern const uint3 blockIdx GPU_LAYERS_BUILTIN(blockIdx);
extern const dim3 blockDim GPU_LAYERS_BUILTIN(blockDim);
extern const dim3 gridDim GPU_LAYERS_BUILTIN(gridDim);
#undef GPU_LAYERS_BUILTIN

static const int warpSize = 32;

#endif  // GPU_LAYERS_EMULATOR_BUILTIN_VARIABLES_H_
