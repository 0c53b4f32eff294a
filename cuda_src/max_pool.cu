// Max pooling: the largest value of each window, and the number of the tap that held it.
#include "pool_taps.cuh"
#include "pool_window.cuh"

// y = largest value of each window: the first of equal ones, the last of several NaN; padding is never
// chosen.
//   x         [images, input, groups] of Width T, aligned to the vector
//   y         [images, output, groups] of Width T, likewise
//   taps      shape of y, window.tap_bytes each (1 where Width > 1): number of the tap chosen; 0 where none
//             counts
//   lengths   [samples, 3], or null: sizes of each sample
// A window without a tap inside the image is -inf; without one inside the sample's sizes, 0.
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are outputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_forward(const T* x, T* y, unsigned char* taps, const long long* lengths, PoolWindow window) {
    using A = accumulate_t<T>;
    const long long image_size = input_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        const T* image = x + output.image * image_size * Width;
        const PoolExtent<Index> extent(window, lengths, output.image);
        // As they are: a NaN keeps its bits.
        Vector<T, Width> best;
        int chosen[Width];
        bool found = false;
        A nothing = A(0);
        if (lengths == nullptr) set_negative_infinity(nothing);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            best[k] = from_accumulate<T>(nothing);
            chosen[k] = 0;
        }
        for_each_tap(window, output, extent, [&](int tap, Index i) {
            const Vector<T, Width> values = Vector<T, Width>::load(image + static_cast<long long>(i) * Width);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A value = to_accumulate(values[k]);
                if (!found || value > to_accumulate(best[k]) || value != value) {
                    best[k] = values[k];
                    chosen[k] = tap;
                }
            }
            found = true;
        });
        best.store(y + unit * Width);
        store_taps<Width>(taps, unit, chosen, window.tap_bytes);
    });
}

// y = the value at the tap that each window chose, and +0 for a window that chose none: the map whose transpose is
// max_pool_backward.
//   x, taps, y, lengths   as above; the taps are those of another array
// Launch: as max_pool_forward; units are outputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_gather(const T* x, const unsigned char* taps, T* y, const long long* lengths, PoolWindow window) {
    const long long image_size = input_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        const T* image = x + output.image * image_size * Width;
        const PoolExtent<Index> extent(window, lengths, output.image);
        int chosen[Width];
        load_taps<Width>(taps, unit, chosen, window.tap_bytes);
        Vector<T, Width> result;
#pragma unroll
        for (int k = 0; k < Width; ++k) result[k] = from_accumulate<T>(accumulate_t<T>(0));
        for_each_tap(window, output, extent, [&](int tap, Index i) {
            const T* values = image + static_cast<long long>(i) * Width;
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (chosen[k] == tap) result[k] = values[k];
            }
        });
        result.store(y + unit * Width);
    });
}

// dx = sum of the gradients of the windows that chose the element, in the order of the taps.
//   dy, taps   [images, output, groups] of Width T, window.tap_bytes; aligned to the vector
//   dx         [images, input, groups] of Width T, likewise: every element is written once
//   lengths    [samples, 3], or null: elements beyond get 0
// Launch: as max_pool_forward; units are inputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_backward(const T* dy, const unsigned char* taps, T* dx, const long long* lengths,
                      PoolWindow window) {
    using A = accumulate_t<T>;
    const long long image_size = output_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& input, long long unit) {
        const long long image = input.image * image_size;
        A sum[Width] = {};
        if (lengths == nullptr || PoolExtent<Index>(window, lengths, input.image).contains(input.at)) {
            for_each_covering_window(window, input, [&](int tap, Index i, const Index(&)[3]) {
                int chosen[Width];
                load_taps<Width>(taps, image + i, chosen, window.tap_bytes);
                const Vector<T, Width> gradients = Vector<T, Width>::load(dy + (image + i) * Width);
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    if (chosen[k] == tap) sum[k] += to_accumulate(gradients[k]);
                }
            });
        }
        Vector<T, Width> result;
#pragma unroll
        for (int k = 0; k < Width; ++k) result[k] = from_accumulate<T>(sum[k]);
        result.store(dx + unit * Width);
    });
}

// As max_pool_backward, of windows that do not overlap: each is read once, and all of its inputs written from
// there.
//   dy, taps, dx   as there
// Launch: as max_pool_forward; units are outputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_scatter(const T* dy, const unsigned char* taps, T* dx, PoolWindow window) {
    const long long image_size = input_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        T* image = dx + output.image * image_size * Width;
        int chosen[Width];
        load_taps<Width>(taps, unit, chosen, window.tap_bytes);
        Vector<T, Width> gradients = Vector<T, Width>::load(dy + unit * Width);
        // A sum, for it makes +0 of -0.
#pragma unroll
        for (int k = 0; k < Width; ++k)
            gradients[k] = from_accumulate<T>(widened(gradients, k) + accumulate_t<T>(0));
        for_each_own_input(window, output, [&](int tap, Index i) {
            Vector<T, Width> result;
#pragma unroll
            for (int k = 0; k < Width; ++k)
                result[k] = chosen[k] == tap ? gradients[k] : from_accumulate<T>(accumulate_t<T>(0));
            result.store(image + static_cast<long long>(i) * Width);
        });
    });
}
