// What a CUDA compiler knows before the first line of a .cu file. Included ahead of it by the build.
#ifndef GPU_LAYERS_EMULATOR_EMULATED_CUDA_H_
#define GPU_LAYERS_EMULATOR_EMULATED_CUDA_H_

// Those of the standard library that spell an attribute __noinline__ come before the word is taken.
#include <memory>

#include "cuda_host_defines.h"
// After the words above: the CUDA headers are written in them.
#include <vector_functions.h>
#include <vector_types.h>

#include "async_copies.h"
#include "atomic_functions.h"
#include "builtin_variables.h"
#include "cache_hints.h"
#include "device_math.h"
#include "half_functions.h"
#include "synchronization.h"
#include "warp_functions.h"

#define __noinline__ __attribute__((noinline))

#endif  // GPU_LAYERS_EMULATOR_EMULATED_CUDA_H_
