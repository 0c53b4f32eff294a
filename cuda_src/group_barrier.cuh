// A barrier between the blocks of a group.
#pragma once

// Waits until so many arrivals have been counted: the blocks of the group times the barriers so far, this one
// included. What a block wrote to global memory before it, all others see after it.
//   arrived   in global memory, 0 when the launch begins; of this group alone
// Only in a cooperative launch, whose blocks are all resident: otherwise those that wait might keep the
// others from starting. All threads of the block must call it.
__device__ __forceinline__ void group_barrier(unsigned int* arrived, unsigned int expected) {
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        while (atomicAdd(arrived, 0u) < expected) __nanosleep(32);
        __threadfence();
    }
    __syncthreads();
}
