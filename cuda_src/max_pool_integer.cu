// Max pooling of whole numbers: no NaN, and no gradient.
#include "argmax.cuh"
#include "pool_window.cuh"

// The smallest number of a type.
template <typename T>
__device__ __forceinline__ T smallest_integer() {
    return static_cast<T>(T(-1) < T(0) ? T(1) << (8 * sizeof(T) - 1) : T(0));
}
template <>
__device__ __forceinline__ int smallest_integer<int>() {
    return static_cast<int>(0x80000000u);
}
template <>
__device__ __forceinline__ long long smallest_integer<long long>() {
    return static_cast<long long>(0x8000000000000000ull);
}

// y = largest value of each window, the first of equal ones; the smallest number of T where no tap is inside.
//   x, y, argmax, lengths   as of max_pool_forward; without a tap inside its sample's sizes a window is 0
// Launch: as max_pool_forward; units are outputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_integer_forward(const T* x, T* y, unsigned char* argmax, const long long* lengths,
                             PoolWindow window) {
    const long long image_size = input_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        const T* image = x + output.image * image_size * Width;
        const PoolExtent<Index> extent(window, lengths, output.image);
        Vector<T, Width> best;
        int chosen[Width];
        bool found = false;
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            best[k] = lengths == nullptr ? smallest_integer<T>() : T(0);
            chosen[k] = 0;
        }
        for_each_tap(window, output, extent, [&](int tap, Index i) {
            const Vector<T, Width> values = Vector<T, Width>::load(image + static_cast<long long>(i) * Width);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (!found || values[k] > best[k]) {
                    best[k] = values[k];
                    chosen[k] = tap;
                }
            }
            found = true;
        });
        best.store(y + unit * Width);
        store_argmax<Width>(argmax, unit, chosen, window.argmax_bytes);
    });
}
