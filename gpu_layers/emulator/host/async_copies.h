// Asynchronous copies from global to shared memory, by the names of cuda_pipeline_primitives.h.
//
// A GPU may copy at any time between the start and the wait. Here it is at the wait, so that a thread that
// reads before finds what was there, and one that never waits finds nothing.
#ifndef GPU_LAYERS_EMULATOR_ASYNC_COPIES_H_
#define GPU_LAYERS_EMULATOR_ASYNC_COPIES_H_

#include <vector_types.h>

#include "device_runtime.h"

__forceinline__ void __pipeline_memcpy_async(void* shared, const void* global, size_t size, GPU_LAYERS_HERE) {
    gpu_layers_emulator::start_async_copy(shared, global, size, {file, line});
}

__forceinline__ void __pipeline_commit() { gpu_layers_emulator::commit_async_copies(); }

// The copies are made here, in instrumented code: checked mode sees them as this thread's accesses.
__forceinline__ void __pipeline_wait_prior(size_t batches) {
    gpu_layers_emulator::AsyncCopy copy;
    while (gpu_layers_emulator::next_async_copy(batches, copy)) {
        switch (copy.size) {
            case 4:
                *static_cast<unsigned*>(copy.shared) = *static_cast<const unsigned*>(copy.global);
                break;
            case 8:
                *static_cast<uint2*>(copy.shared) = *static_cast<const uint2*>(copy.global);
                break;
            default:
                *static_cast<uint4*>(copy.shared) = *static_cast<const uint4*>(copy.global);
        }
    }
}

#endif  // GPU_LAYERS_EMULATOR_ASYNC_COPIES_H_
