// Reductions over the threads of a warp and of a block, in an order fixed by the thread index.
#pragma once

constexpr int kWarpThreads = 32;
constexpr unsigned int kFullWarp = 0xffffffffu;

// Combines the values of all 32 lanes.
//   value   has combine(other) -> Value, and shuffled_down(delta) -> the value of lane + delta
// All lanes of the warp must call it; lane 0 gets the result.
template <typename Value>
__device__ __forceinline__ Value warp_reduce(Value value) {
#pragma unroll
    for (int delta = kWarpThreads / 2; delta > 0; delta /= 2)
        value = value.combine(value.shuffled_down(delta));
    return value;
}

// Combines the values of all threads of a block.
//   warp_values   [threads / 32] in shared memory, free for use
//   __shared__ GradientSums<float> warp_sums[kThreads / kWarpThreads];
//   const GradientSums<float> all = block_reduce(own, warp_sums);
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
