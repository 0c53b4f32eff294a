// Block and warp barriers, memory fences, and the dynamic shared memory they guard.
#ifndef GPU_LAYERS_EMULATOR_SYNCHRONIZATION_H_
#define GPU_LAYERS_EMULATOR_SYNCHRONIZATION_H_

#include "device_runtime.h"

// Declares `unsigned char* name`, the dynamic shared memory of the running block. CUDA's own spelling,
// `extern __shared__ T name[]`, names one object whose size and address a host compiler would fix.
#define GPU_LAYERS_DYNAMIC_SHARED(name) unsigned char* name = ::gpu_layers_emulator::dynamic_shared_memory()

inline void __syncthreads(GPU_LAYERS_HERE) {
    gpu_layers_emulator::block_barrier(gpu_layers_emulator::BlockVote::kNone, 0, {file, line});
}
inline int __syncthreads_count(int predicate, GPU_LAYERS_HERE) {
    return gpu_layers_emulator::block_barrier(gpu_layers_emulator::BlockVote::kCount, predicate,
                                              {file, line});
}
inline int __syncthreads_and(int predicate, GPU_LAYERS_HERE) {
    return gpu_layers_emulator::block_barrier(gpu_layers_emulator::BlockVote::kAnd, predicate, {file, line});
}
inline int __syncthreads_or(int predicate, GPU_LAYERS_HERE) {
    return gpu_layers_emulator::block_barrier(gpu_layers_emulator::BlockVote::kOr, predicate, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, GPU_LAYERS_HERE) {
    gpu_layers_emulator::warp_collective(gpu_layers_emulator::WarpOperation::kSync, mask, 0, 0, 32,
                                         {file, line});
}

inline void __threadfence_block() { gpu_layers_emulator::memory_fence(); }
inline void __threadfence() { gpu_layers_emulator::memory_fence(); }
inline void __threadfence_system() { gpu_layers_emulator::memory_fence(); }
inline void __nanosleep(unsigned, GPU_LAYERS_HERE) { gpu_layers_emulator::sleep_thread({file, line}); }

inline void __trap(GPU_LAYERS_HERE) { gpu_layers_emulator::device_trap("__trap()", {file, line}); }

#endif  // GPU_LAYERS_EMULATOR_SYNCHRONIZATION_H_
