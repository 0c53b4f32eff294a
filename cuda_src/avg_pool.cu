// Average pooling.
#include "pool_window.cuh"

// What the sum of a window is divided by.
template <typename A>
struct PoolDivisor {
    A reciprocal;        // of the divisor of a window with `count` taps, or of every window
    int count;           // 0: every window has the same divisor
    int padding_counts;  // whether taps in the padding count
    int pad_after[3];

    // Taps of a window along one axis that count.
    template <typename Window, typename Index>
    __device__ __forceinline__ int counted(const PoolWindow& window, int axis, Index output) const {
        const int kernel = Window::kernel(window, axis);
        const int dilation = Window::dilation(window, axis);
        const Index origin = output * Window::stride(window, axis) - window.pad[axis];
        const Index end = static_cast<Index>(window.input[axis]) + (padding_counts ? pad_after[axis] : 0);
        // The first window starts at -pad, so that no tap is before the padding.
        const Index before = padding_counts || origin >= 0 ? Index(0) : (dilation - 1 - origin) / dilation;
        const Index up_to = origin >= end ? Index(0) : (end - origin + dilation - 1) / dilation;
        const Index inside = (up_to < kernel ? up_to : static_cast<Index>(kernel)) - before;
        return inside < 0 ? 0 : static_cast<int>(inside);
    }

    // 1 / divisor of the window at `output`. Only a window that is cut off needs a division.
    template <typename Window, typename Index>
    __device__ __forceinline__ A of(const PoolWindow& window, const Index (&output)[3]) const {
        if (count == 0) return reciprocal;
        const int taps = counted<Window>(window, 0, output[0]) * counted<Window>(window, 1, output[1]) *
                         counted<Window>(window, 2, output[2]);
        if (taps == count) return reciprocal;
        // A window of nothing but padding sums to 0: any divisor but 0 leaves it 0.
        return A(1) / static_cast<A>(taps > 0 ? taps : 1);
    }
};

// y = sum of each window, in the order of the taps, over its divisor.
//   x   [images, input, groups] of Width T, aligned to the vector
//   y   [images, output, groups] of Width T, likewise
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); a thread has a vector of outputs at a time.
template <typename T, int Width, typename Window, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    avg_pool_forward(const T* x, T* y, PoolWindow window, PoolDivisor<accumulate_t<T>> divisor) {
    using A = accumulate_t<T>;
    const long long output_size = PoolOutput::image_size(window);
    const long long input_size = PoolInput::image_size(window);
    const long long total = window.images * output_size;
    for (long long first = blockIdx.x * static_cast<long long>(kPoolThreads); first < total;
         first += gridDim.x * static_cast<long long>(kPoolThreads)) {
        if (first + threadIdx.x >= total) break;
        const PoolPosition<Index> output = pool_position<PoolOutput, Index>(window, first, threadIdx.x);
        const T* image = x + output.image * input_size * Width;
        A sum[Width] = {};
        for_each_tap<Window>(window, output, [&](int, Index i) {
            const Vector<T, Width> values = Vector<T, Width>::load(image + static_cast<long long>(i) * Width);
#pragma unroll
            for (int k = 0; k < Width; ++k) sum[k] += to_accumulate(values[k]);
        });
        const A factor = divisor.template of<Window>(window, output.at);
        Vector<T, Width> result;
#pragma unroll
        for (int k = 0; k < Width; ++k) result[k] = from_accumulate<T>(sum[k] * factor);
        result.store(y + (first + threadIdx.x) * Width);
    }
}

// dx = sum of dy over its divisor of the windows over the element, in the order of the taps.
//   dy   [images, output, groups] of Width T, aligned to the vector
//   dx   [images, input, groups] of Width T, likewise: every element is written once
// Launch: as avg_pool_forward; a thread has a vector of inputs at a time.
template <typename T, int Width, typename Window, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    avg_pool_backward(const T* dy, T* dx, PoolWindow window, PoolDivisor<accumulate_t<T>> divisor) {
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
        for_each_covering_window<Window>(window, input, [&](int, Index i, const Index(&output)[3]) {
            const A factor = divisor.template of<Window>(window, output);
            const Vector<T, Width> gradients = Vector<T, Width>::load(dy + (image + i) * Width);
#pragma unroll
            for (int k = 0; k < Width; ++k) sum[k] = fma(to_accumulate(gradients[k]), factor, sum[k]);
        });
        Vector<T, Width> result;
#pragma unroll
        for (int k = 0; k < Width; ++k) result[k] = from_accumulate<T>(sum[k]);
        result.store(dx + (first + threadIdx.x) * Width);
    }
}
