// Memory for copies of the caller's arrays, in the modes that look for overruns.
#ifndef GPU_LAYERS_EMULATOR_ARGUMENT_MEMORY_H_
#define GPU_LAYERS_EMULATOR_ARGUMENT_MEMORY_H_

#include <cstdint>

namespace gpu_layers_emulator {

// `bytes` bytes that begin `offset` bytes after a multiple of 512, as a GPU's allocator aligns to, with
// nothing valid around them.
void* allocate_argument(uint64_t bytes, uint64_t offset);
void free_argument(void* memory);

}  // namespace gpu_layers_emulator

#endif  // GPU_LAYERS_EMULATOR_ARGUMENT_MEMORY_H_
