// Max pooling: the largest value of each window, and the number of the tap that held it.
#include "pool_window.cuh"

// y = largest value of each window: the first of equal ones, the last of several NaN; padding is never
// chosen.
//   x      [images, input, groups] of Width T, aligned to the vector
//   y      [images, output, groups] of Width T, likewise
//   taps   shape of y, Tap: number of the tap chosen; 0 where no tap is inside the input, and y is -inf
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); a thread has a vector of outputs at a time.
template <typename T, typename Tap, int Width, typename Window, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_forward(const T* x, T* y, Tap* taps, PoolWindow window) {
    using A = accumulate_t<T>;
    const long long output_size = PoolOutput::image_size(window);
    const long long input_size = PoolInput::image_size(window);
    const long long total = window.images * output_size;
    for (long long first = blockIdx.x * static_cast<long long>(kPoolThreads); first < total;
         first += gridDim.x * static_cast<long long>(kPoolThreads)) {
        if (first + threadIdx.x >= total) break;
        const PoolPosition<Index> output = pool_position<PoolOutput, Index>(window, first, threadIdx.x);
        const T* image = x + output.image * input_size * Width;
        A best[Width];
        Vector<Tap, Width> chosen;
        bool found = false;
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            set_negative_infinity(best[k]);
            chosen[k] = 0;
        }
        for_each_tap<Window>(window, output, [&](int tap, Index i) {
            const Vector<T, Width> values = Vector<T, Width>::load(image + static_cast<long long>(i) * Width);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A value = to_accumulate(values[k]);
                if (!found || value > best[k] || value != value) {
                    best[k] = value;
                    chosen[k] = static_cast<Tap>(tap);
                }
            }
            found = true;
        });
        Vector<T, Width> result;
#pragma unroll
        for (int k = 0; k < Width; ++k) result[k] = from_accumulate<T>(best[k]);
        const long long target = (first + threadIdx.x) * Width;
        result.store(y + target);
        chosen.store(taps + target);
    }
}

// dx = sum of the gradients of the windows that chose the element, in the order of the taps.
//   dy, taps   [images, output, groups] of Width T, Tap, aligned to the vector
//   dx         [images, input, groups] of Width T, likewise: every element is written once
// Launch: as max_pool_forward; a thread has a vector of inputs at a time.
template <typename T, typename Tap, int Width, typename Window, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_backward(const T* dy, const Tap* taps, T* dx, PoolWindow window) {
    using A = accumulate_t<T>;
    const long long output_size = PoolOutput::image_size(window);
    const long long input_size = PoolInput::image_size(window);
    const long long total = window.images * input_size;
    for (long long first = blockIdx.x * static_cast<long long>(kPoolThreads); first < total;
         first += gridDim.x * static_cast<long long>(kPoolThreads)) {
        if (first + threadIdx.x >= total) break;
        const PoolPosition<Index> input = pool_position<PoolInput, Index>(window, first, threadIdx.x);
        const long long image = input.image * output_size;
        A sum[Width] = {};
        for_each_covering_window<Window>(window, input, [&](int tap, Index i, const Index(&)[3]) {
            const long long source = (image + i) * Width;
            const Vector<Tap, Width> chosen = Vector<Tap, Width>::load(taps + source);
            const Vector<T, Width> gradients = Vector<T, Width>::load(dy + source);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (chosen[k] == static_cast<Tap>(tap)) sum[k] += to_accumulate(gradients[k]);
            }
        });
        Vector<T, Width> result;
#pragma unroll
        for (int k = 0; k < Width; ++k) result[k] = from_accumulate<T>(sum[k]);
        result.store(dx + (first + threadIdx.x) * Width);
    }
}
