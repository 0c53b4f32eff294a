// The inverse of max pooling: values go back to where their maxima were.
#include "numeric.cuh"
#include "reduce.cuh"

constexpr int kUnpoolThreads = 256;

// found[block] = whether one of the indices that the block looked at is outside 0 .. plane - 1.
//   indices   [n]
//   found     [number of blocks]
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride).
template <typename Found>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_check(const long long* indices, Found* found, long long plane, long long n) {
    int outside = 0;
    for (long long i = blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x; i < n;
         i += gridDim.x * static_cast<long long>(kUnpoolThreads))
        outside |= indices[i] < 0 || indices[i] >= plane;
    outside = __syncthreads_or(outside);
    if (threadIdx.x == 0) found[blockIdx.x] = static_cast<Found>(outside);
}

// y = 0, and each value at its index in the plane; of equal indices the last one counts, one outside the
// plane does not.
//   x, indices   [planes, values] T, int64
//   y            [planes, plane] T
//   segments     a warp has one of so many parts of a plane: nothing is written by two
// A warp reads the values of its plane in order, 32 at a time; of lanes with one index the last one writes.
// Launch: 1-D, kUnpoolThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_forward(const T* x, const long long* indices, T* y, long long planes, long long values,
                       long long plane, long long segments) {
    const int lane = threadIdx.x % kWarpThreads;
    const long long warp = (blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x) / kWarpThreads;
    const long long warps = gridDim.x * static_cast<long long>(kUnpoolThreads / kWarpThreads);
    const long long size = (plane + segments - 1) / segments;
    for (long long part = warp; part < planes * segments; part += warps) {
        const long long image = part / segments;
        const long long begin = (part - image * segments) * size;
        const long long end = begin + size < plane ? begin + size : plane;
        T* target = y + image * plane;
        for (long long i = begin + lane; i < end; i += kWarpThreads) target[i] = from_accumulate<T>(0);
        __syncwarp();
        for (long long first = 0; first < values; first += kWarpThreads) {
            const long long i = first + lane;
            const long long index = i < values ? indices[image * values + i] : -1;
            const bool mine = index >= begin && index < end;
            const unsigned int same = __match_any_sync(kFullWarp, index);
            if (mine && (same >> lane) == 1) target[index] = x[image * values + i];
            __syncwarp();
        }
    }
}

// dx = the gradient at each index; 0 for one outside the plane.
//   dy        [planes, plane] T
//   indices   [planes, values]
//   dx        [planes, values] T
// Launch: 1-D, kUnpoolThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kUnpoolThreads, 4)
    max_unpool_backward(const T* dy, const long long* indices, T* dx, long long planes, long long values,
                        long long plane) {
    const long long total = planes * values;
    for (long long i = blockIdx.x * static_cast<long long>(kUnpoolThreads) + threadIdx.x; i < total;
         i += gridDim.x * static_cast<long long>(kUnpoolThreads)) {
        const long long index = indices[i];
        const bool inside = index >= 0 && index < plane;
        dx[i] = inside ? dy[i / values * plane + index] : from_accumulate<T>(0);
    }
}
