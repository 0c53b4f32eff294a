// Reductions over the threads of a warp and of a block, in an order fixed by the thread index.
#pragma once

constexpr int kWarpThreads = 32;
constexpr unsigned int kFullWarp = 0xffffffffu;

// Combines the values of all 32 lanes.
//   value   has combine(other) -> Value, and shuffled_xor(mask) -> the value of lane ^ mask
// All lanes of the warp must call it. Lane 0 gets the result, and where combine does not depend on which
// value is the other one, all lanes do.
template <typename Value>
__device__ __forceinline__ Value warp_reduce(Value value) {
#pragma unroll
    for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) value = value.combine(value.shuffled_xor(mask));
    return value;
}

// Sums of so many numbers: what is reduced most often.
//   Sums<float, 2> own = Sums<float, 2>::identity();
//   own.of[0] += value;
//   const Sums<float, 2> all = warp_reduce(own);
template <typename A, int Count>
struct alignas(Count == 2 ? 2 * sizeof(A) : sizeof(A)) Sums {
    A of[Count];

    static __device__ __forceinline__ Sums identity() {
        Sums zeros;
#pragma unroll
        for (int i = 0; i < Count; ++i) zeros.of[i] = A(0);
        return zeros;
    }

    __device__ __forceinline__ Sums combine(const Sums& other) const {
        Sums both;
#pragma unroll
        for (int i = 0; i < Count; ++i) both.of[i] = of[i] + other.of[i];
        return both;
    }

    __device__ __forceinline__ Sums shuffled_xor(int mask) const {
        Sums others;
#pragma unroll
        for (int i = 0; i < Count; ++i) others.of[i] = __shfl_xor_sync(kFullWarp, of[i], mask);
        return others;
    }
};

// Combines the values of all threads of a block.
//   warp_values   [threads / 32] in shared memory, free for use
//   __shared__ Sums<float, 2> warp_sums[kThreads / kWarpThreads];
//   const Sums<float, 2> all = block_reduce(own, warp_sums);
//   if (threadIdx.x == 0) write(all);
// All threads of the block must call it, with a number of threads that is a multiple of 32; thread 0 gets
// the result.
template <typename Value>
__device__ __forceinline__ Value block_reduce(Value value, Value* warp_values) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const int warps = blockDim.x * blockDim.y / kWarpThreads;
    value = warp_reduce(value);
    if (thread % kWarpThreads == 0) warp_values[thread / kWarpThreads] = value;
    __syncthreads();
    if (thread < kWarpThreads) {
        value = thread < warps ? warp_values[thread] : Value::identity();
        value = warp_reduce(value);
    }
    return value;
}
