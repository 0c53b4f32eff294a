// Kernels with one bug each, and their corrected twins: `template <bool kCorrect>`. The tests look for the
// line marked with the bug's name, so the marks must stay where the error is reported.
#include <cooperative_groups.h>

// --- Missing barriers -----------------------------------------------------------------------------------

// Reverses each block through shared memory.   Launch: any blocks of 64 threads
template <bool kCorrect>
__global__ void missing_syncthreads(const float* x, float* y) {
    __shared__ float tile[64];
    const unsigned t = threadIdx.x;
    tile[t] = x[blockIdx.x * 64 + t];  // BUG: missing_syncthreads write
    if (kCorrect) __syncthreads();
    y[blockIdx.x * 64 + t] = tile[63 - t];  // BUG: missing_syncthreads read
}

// Two rounds through one array: the second round's writes may overtake the first one's reads.
template <bool kCorrect>
__global__ void missing_second_syncthreads(const float* x, float* y) {
    __shared__ float tile[64];
    const unsigned t = threadIdx.x;
    float sum = 0.0f;
    for (int round = 0; round < 2; ++round) {
        tile[t] = x[round * 64 + t];  // BUG: missing_second_syncthreads write
        __syncthreads();
        sum += tile[63 - t];  // BUG: missing_second_syncthreads read
        if (kCorrect) __syncthreads();
    }
    y[t] = sum;
}

// Lanes of one warp exchange values without __syncwarp().   Launch: 1 block of 32 threads
template <bool kCorrect>
__global__ void missing_syncwarp(const float* x, float* y) {
    __shared__ float tile[32];
    tile[threadIdx.x] = x[threadIdx.x];
    if (kCorrect) __syncwarp();
    y[threadIdx.x] = tile[31 - threadIdx.x];  // BUG: missing_syncwarp
}

// A shuffle makes lanes meet, but promises nothing about memory.
template <bool kCorrect>
__global__ void shuffle_instead_of_syncwarp(const float* x, float* y) {
    __shared__ float tile[32];
    tile[threadIdx.x] = x[threadIdx.x];
    float mine = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
    if (kCorrect) __syncwarp();
    y[threadIdx.x] = mine + tile[31 - threadIdx.x];  // BUG: shuffle_instead_of_syncwarp
}

// --- Barriers that not everybody reaches ------------------------------------------------------------------

template <bool kCorrect>
__global__ void divergent_barrier(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    if (kCorrect) {
        __syncthreads();
    } else if (threadIdx.x < 32) {
        __syncthreads();  // BUG: divergent_barrier first
    } else {
        __syncthreads();  // BUG: divergent_barrier second
    }
    y[threadIdx.x] = tile[63 - threadIdx.x];
}

// Threads beyond n leave before the barrier.
template <bool kCorrect>
__global__ void early_return(const float* x, float* y, int n) {
    __shared__ float tile[64];
    const int i = threadIdx.x;
    if (!kCorrect && i >= n) return;
    if (i < n) tile[i] = x[i];
    __syncthreads();  // BUG: early_return
    if (i < n) y[i] = tile[n - 1 - i];
}

// Half a warp waits for its warp, the other half for the block.
template <bool kCorrect>
__global__ void deadlock(const float* x, float* y) {
    if (threadIdx.x < 16) {
        __syncwarp(kCorrect ? 0x0000ffffu : 0xffffffffu);  // BUG: deadlock lanes
    }
    __syncthreads();  // BUG: deadlock others
    y[threadIdx.x] = x[threadIdx.x];
}

// --- Bounds and alignment ---------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void off_by_one(const float* x, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (kCorrect ? i < n : i <= n) {
        y[i] = x[i];  // BUG: off_by_one
    }
}

template <bool kCorrect>
__global__ void off_by_one_store(float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[kCorrect ? i : i - 1] = 1.0f;  // BUG: off_by_one_store
    }
}

template <bool kCorrect>
__global__ void shared_overrun(const float* x, float* y) {
    __shared__ float guarded[32];
    __shared__ float neighbour[32];
    const unsigned t = threadIdx.x;
    neighbour[t] = 0.0f;
    guarded[kCorrect ? t : t + 1] = x[t];  // BUG: shared_overrun
    __syncthreads();
    y[t] = guarded[t] + neighbour[t];
}

template <bool kCorrect>
__global__ void dynamic_shared_overrun(const float* x, float* y) {
    GPU_LAYERS_DYNAMIC_SHARED(raw);
    float* tile = reinterpret_cast<float*>(raw);
    tile[kCorrect ? threadIdx.x : threadIdx.x + 1] = x[threadIdx.x];  // BUG: dynamic_shared_overrun
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

// 16-byte loads of an array that is not aligned to 16 bytes.   x: 4 * threads + 1 floats
template <bool kCorrect>
__global__ void misaligned(const float* x, float4* y) {
    const float* begin = x + (kCorrect ? 0 : 1);
    y[threadIdx.x] = reinterpret_cast<const float4*>(begin)[threadIdx.x];  // BUG: misaligned
}

template <bool kCorrect>
__global__ void null_pointer(const float* x, float* y) {
    if (!kCorrect || x != nullptr) y[threadIdx.x] = x[threadIdx.x];  // BUG: null_pointer
}

template <bool kCorrect>
__global__ void write_through_const(const float* x, float* y) {
    float* target = kCorrect ? y : const_cast<float*>(x);
    target[threadIdx.x] = 1.0f;  // BUG: write_through_const
}

// --- Uninitialised memory
// -----------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void uninitialised_shared(const float* x, float* y) {
    __shared__ float sums[8];
    if (kCorrect && threadIdx.x < 8) sums[threadIdx.x] = 0.0f;
    __syncthreads();
    if (threadIdx.x < 8) {
        sums[threadIdx.x] += x[threadIdx.x];  // BUG: uninitialised_shared
        y[threadIdx.x] = sums[threadIdx.x];
    }
}

template <bool kCorrect>
__global__ void uninitialised_global(const float* x, float* y) {
    if (kCorrect) y[threadIdx.x] = 0.0f;
    y[threadIdx.x] += x[threadIdx.x];  // BUG: uninitialised_global
}

// --- Asynchronous copies
// ----------------------------------------------------------------------------------------------------

// Launch of these: 1 block of 64 threads
template <bool kCorrect>
__global__ void missing_wait_for_copies(const float* x, float* y) {
    __shared__ float tile[64];
    const unsigned t = threadIdx.x;
    __pipeline_memcpy_async(tile + t, x + t, sizeof(float));
    __pipeline_commit();
    if (kCorrect) __pipeline_wait_prior(0);
    y[t] = tile[t];  // BUG: missing_wait_for_copies
}

// A wait for all but the last batch: its copy may not have been made.
template <bool kCorrect>
__global__ void wait_for_the_batch_before(const float* x, float* y) {
    __shared__ float tile[128];
    const unsigned t = threadIdx.x;
    for (unsigned batch = 0; batch < 2; ++batch) {
        __pipeline_memcpy_async(tile + t + 64 * batch, x + t + 64 * batch, sizeof(float));
        __pipeline_commit();
    }
    __pipeline_wait_prior(kCorrect ? 0 : 1);
    y[t] = tile[t] + tile[t + 64];  // BUG: wait_for_the_batch_before
}

// A thread's wait says nothing of the copies of others.
template <bool kCorrect>
__global__ void missing_barrier_after_copies(const float* x, float* y) {
    __shared__ float tile[64];
    const unsigned t = threadIdx.x;
    __pipeline_memcpy_async(tile + t, x + t, sizeof(float));
    __pipeline_commit();
    __pipeline_wait_prior(0);
    if (kCorrect) __syncthreads();
    y[t] = tile[63 - t];  // BUG: missing_barrier_after_copies
}

template <bool kCorrect>
__global__ void misaligned_copy(const float* x, float* y) {
    __shared__ float4 tile[64];
    const unsigned t = threadIdx.x;
    const float* from = x + (kCorrect ? 4 : 1) * (t % 8);
    __pipeline_memcpy_async(tile + t, from, sizeof(float4));  // BUG: misaligned_copy
    __pipeline_commit();
    __pipeline_wait_prior(0);
    y[t] = tile[t].x;
}

// --- Races
// ----------------------------------------------------------------------------------------------------

// Every block writes the same element.
template <bool kCorrect>
__global__ void race_between_blocks(const float* x, float* y) {
    if (threadIdx.x == 0) {
        y[kCorrect ? blockIdx.x : 0] = x[blockIdx.x];  // BUG: race_between_blocks
    }
}

template <bool kCorrect>
__global__ void plain_beside_atomic(int* counter, int* y) {
    atomicAdd(counter, 1);  // BUG: plain_beside_atomic update
    if (kCorrect) {
        y[threadIdx.x] = atomicAdd(counter, 0);
    } else {
        y[threadIdx.x] = *counter;  // BUG: plain_beside_atomic
    }
}

// The last block to finish adds up what all blocks wrote: it needs their fences.
template <bool kCorrect>
__global__ void missing_threadfence(const float* x, float* partial, unsigned* ticket, float* y) {
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = x[blockIdx.x];  // BUG: missing_threadfence write
        if (kCorrect) __threadfence();
        is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (is_last && threadIdx.x == 0) {
        if (kCorrect) __threadfence();
        float sum = 0.0f;
        for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];  // BUG: missing_threadfence
        *y = sum;
    }
}

// Blocks of a cooperative launch wait for each other on a counter of their own.
template <bool kCorrect>
__global__ void group_barrier_without_fence(const float* x, float* partial, unsigned* arrived, float* y) {
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = x[blockIdx.x];  // BUG: group_barrier_without_fence write
        if (kCorrect) __threadfence();
        atomicAdd(arrived, 1u);
        while (atomicAdd(arrived, 0u) < gridDim.x) __nanosleep(32);
        if (kCorrect) __threadfence();
        y[blockIdx.x] = partial[gridDim.x - 1 - blockIdx.x];  // BUG: group_barrier_without_fence
    }
}

// The same, where what others wrote is published, and the one that reads it does not take it over.
template <bool kCorrect>
__global__ void group_barrier_without_acquire(const float* x, float* partial, unsigned* arrived, float* y) {
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = x[blockIdx.x];  // BUG: group_barrier_without_acquire write
        __threadfence();
        atomicAdd(arrived, 1u);
        while (atomicAdd(arrived, 0u) < gridDim.x) __nanosleep(32);
        if (kCorrect) __threadfence();
        y[blockIdx.x] = partial[gridDim.x - 1 - blockIdx.x];  // BUG: group_barrier_without_acquire
    }
}

// One block more is waited for than there are.
template <bool kCorrect>
__global__ void group_barrier_of_too_many(unsigned* arrived, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = 1.0f;
    if (threadIdx.x == 0) {
        atomicAdd(arrived, 1u);
        while (atomicAdd(arrived, 0u) < gridDim.x + (kCorrect ? 0 : 1))
            __nanosleep(32);  // BUG: group_barrier_of_too_many
    }
    __syncthreads();  // BUG: group_barrier_of_too_many others
    y[blockIdx.x * blockDim.x + threadIdx.x] = tile[threadIdx.x];
}

// --- Warp operations
// ------------------------------------------------------------------------------------------

// Lanes 16 to 31 call with a mask of the lower half.
template <bool kCorrect>
__global__ void wrong_mask(const float* x, float* y) {
    const unsigned mask = kCorrect && threadIdx.x >= 16 ? 0xffff0000u : 0x0000ffffu;
    y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);  // BUG: wrong_mask
}

template <bool kCorrect>
__global__ void different_masks(const float* x, float* y) {
    const unsigned mask = kCorrect || threadIdx.x < 16 ? 0xffffffffu : 0xfffffffeu;
    y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 1);  // BUG: different_masks
}

template <bool kCorrect>
__global__ void shuffle_from_exited_lane(const float* x, float* y, int n) {
    const int i = threadIdx.x;
    float value = i < n ? x[i] : 0.0f;
    if (!kCorrect && i >= n) return;
    value += __shfl_down_sync(0xffffffffu, value, 1);  // BUG: shuffle_from_exited_lane
    if (i < n) y[i] = value;
}

template <bool kCorrect>
__global__ void shuffle_from_outside_the_mask(const float* x, float* y) {
    if (kCorrect || threadIdx.x < 16) {
        const unsigned mask = kCorrect ? 0xffffffffu : 0x0000ffffu;
        y[threadIdx.x] = __shfl_xor_sync(mask, x[threadIdx.x], 16);  // BUG: shuffle_from_outside_the_mask
    }
}

template <bool kCorrect>
__global__ void different_operations(const float* x, float* y) {
    float value = x[threadIdx.x];
    if (kCorrect) {
        value += __shfl_xor_sync(0xffffffffu, value, 1);
    } else if (threadIdx.x % 2 == 0) {
        value += __shfl_xor_sync(0xffffffffu, value, 1);  // BUG: different_operations one
    } else {
        value += static_cast<float>(__ballot_sync(0xffffffffu, 1));  // BUG: different_operations other
    }
    y[threadIdx.x] = value;
}

// --- Cooperative launches
// -----------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void missing_grid_sync(const float* x, float* partial, float* y) {
    if (threadIdx.x == 0) partial[blockIdx.x] = x[blockIdx.x];
    if (kCorrect) cooperative_groups::this_grid().sync();
    if (threadIdx.x == 0) y[blockIdx.x] = partial[gridDim.x - 1 - blockIdx.x];  // BUG: missing_grid_sync
}

template <bool kCorrect>
__global__ void block_misses_grid_sync(const float* x, float* y) {
    if (!kCorrect && blockIdx.x == 1) return;
    cooperative_groups::this_grid().sync();  // BUG: block_misses_grid_sync
    y[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x];
}

// --- Accidents
// --------------------------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void trap(float* y) {
    if (!kCorrect && threadIdx.x == 3) __trap();  // BUG: trap
    y[threadIdx.x] = 1.0f;
}

template <bool kCorrect>
__global__ void division_by_zero(const int* x, int* y) {
    y[threadIdx.x] = kCorrect && x[threadIdx.x] == 0 ? 0 : 100 / x[threadIdx.x];  // BUG: division_by_zero
}

// Recurses until its stack is full.
__device__ int deep(volatile int* level, int limit) {
    volatile int padding[256];
    padding[0] = ++*level;
    return *level >= limit ? padding[0] : deep(level, limit) + padding[0];
}
template <bool kCorrect>
__global__ void stack_overflow(int* y) {
    int level = 0;
    y[threadIdx.x] = deep(&level, kCorrect ? 3 : 1 << 30);
}
