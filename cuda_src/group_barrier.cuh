// What blocks wait for each other at, or count each other by.
#pragma once

#ifdef GPU_LAYERS_EMULATED
// A fence before a relaxed addition is a release, one after a relaxed read an acquire.
__device__ __forceinline__ void add_release(unsigned int* counter, unsigned int value) {
    __threadfence();
    atomicAdd(counter, value);
}
__device__ __forceinline__ unsigned int load_acquire(unsigned int* counter) {
    const unsigned int value = atomicAdd(counter, 0u);
    __threadfence();
    return value;
}
__device__ __forceinline__ unsigned int add_acquire_release(unsigned int* counter, unsigned int value) {
    __threadfence();
    const unsigned int before = atomicAdd(counter, value);
    __threadfence();
    return before;
}
#else
// Adds to a counter in global memory; who reads the sum by load_acquire also sees what was written before.
__device__ __forceinline__ void add_release(unsigned int* counter, unsigned int value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned int load_acquire(const unsigned int* counter) {
    unsigned int value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}
// Both at once; what the counter was before.
__device__ __forceinline__ unsigned int add_acquire_release(unsigned int* counter, unsigned int value) {
    unsigned int before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(value)
                 : "memory");
    return before;
}
#endif

// Waits until so many arrivals have been counted: the blocks of the group times the barriers so far, this one
// included. What a block wrote to global memory before it, all others see after it.
//   barrier_count   in global memory, 0 when the launch begins; of this group alone
//   parts[rank] = sum_of_own_part();
//   group_barrier(barrier_count, blocks);  // the next one waits for 2 * blocks
//   for (int i = 0; i < blocks; ++i) sum += parts[i];
// Only in a cooperative launch, whose blocks are all resident: otherwise those that wait might keep the
// others from starting.
//
// By one thread, for what it wrote itself; who meets it afterwards, in the block, sees what it sees.
__device__ __forceinline__ void arrive_and_wait(unsigned int* barrier_count, unsigned int expected) {
    add_release(barrier_count, 1u);
    // Reading alone does not hold up those that still arrive.
    while (load_acquire(barrier_count) < expected) __nanosleep(32);
}
// By all threads of a block: __syncthreads() orders the writes of the block before the arrival of its first
// thread, and its reads after what that thread has seen.
__device__ __forceinline__ void group_barrier(unsigned int* barrier_count, unsigned int expected) {
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) arrive_and_wait(barrier_count, expected);
    __syncthreads();
}

// Whether this is the last of so many blocks to come here: then it sees what each of them wrote before.
// Nobody waits, so that any launch will do. All threads of the block must call it.
//   arrived   in global memory, 0 when the launch begins
//   parts[blockIdx.x] = sum_of_own_part();
//   if (arrives_last(arrived, gridDim.x)) fold(parts);
__device__ __forceinline__ bool arrives_last(unsigned int* arrived, unsigned int blocks) {
    __syncthreads();
    const bool is_first = threadIdx.x == 0 && threadIdx.y == 0;
    return __syncthreads_or(is_first && add_acquire_release(arrived, 1u) == blocks - 1u);
}
