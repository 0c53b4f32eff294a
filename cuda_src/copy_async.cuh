// Copies from global to shared memory that a thread starts and does not wait for until it says so. Before
// that the target must be left alone.
//   copy_async(shared + i, global + i);  // other work, then
//   wait_for_copies();
//   use(shared[i]);
#pragma once

// Starts to copy 16 bytes; both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(uint4* shared, const uint4* global) {
#if defined(GPU_LAYERS_EMULATED)
    __pipeline_memcpy_async(shared, global, sizeof(uint4));
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<unsigned int>(__cvta_generic_to_shared(shared))),
                 "l"(global)
                 : "memory");
#else
    *shared = *global;
#endif
}

// Waits for all copies that this thread has started; other threads see them only after a barrier.
__device__ __forceinline__ void wait_for_copies() {
#if defined(GPU_LAYERS_EMULATED)
    __pipeline_commit();
    __pipeline_wait_prior(0);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
