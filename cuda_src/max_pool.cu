// Max pooling: the largest value of each window, and the number of the tap that held it.
#include "argmax.cuh"
#include "division64.cuh"
#include "pool_window.cuh"

// y = largest value of each window: the first of equal ones, the last of several NaN; padding is never
// chosen.
//   x         [images, input, groups] of Width T, aligned to the vector
//   y         [images, output, groups] of Width T
//   argmax    shape of y, window.argmax_bytes each (1 where Width > 1): the tap chosen; 0 where none counts
//   lengths   [samples, axes], or null: sizes of each sample
// A window without a tap inside the image is -inf; without one inside the sample's sizes, 0.
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are outputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_forward(const T* x, T* y, unsigned char* argmax, const long long* lengths, PoolWindow window) {
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
        store_argmax<Width>(argmax, unit, chosen, window.argmax_bytes);
    });
}

// y = the value at the tap that each window chose, and +0 for a window that chose none: the map whose
// transpose is max_pool_backward.
//   x, argmax, y, lengths   as above; the taps are those of another array
// Launch: as max_pool_forward; units are outputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_gather(const T* x, const unsigned char* argmax, T* y, const long long* lengths,
                    PoolWindow window) {
    const long long image_size = input_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        const T* image = x + output.image * image_size * Width;
        const PoolExtent<Index> extent(window, lengths, output.image);
        int chosen[Width];
        load_argmax<Width>(argmax, unit, chosen, window.argmax_bytes);
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

// Outputs of a thread of max_pool_gather_nchw.
constexpr int kGatherOutputs = 8;

// As max_pool_gather, of sliding windows over planes: a thread has neighbouring outputs, and finds the place
// of the tap that each chose.
//   x, argmax, y   as there; argmax and y aligned to 16 bytes
//   by_plane       divides by the outputs of a plane
// Launch: as max_pool_forward, kGatherOutputs a thread; units are outputs.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<int>)
    max_pool_gather_nchw(const T* x, const unsigned char* argmax, T* y, Divisor64 by_plane,
                         PoolWindow window) {
    constexpr int kWidth = kGatherOutputs;
    const int height = static_cast<int>(window.input[1]), width = static_cast<int>(window.input[2]);
    const int rows = static_cast<int>(window.output[1]), columns = static_cast<int>(window.output[2]);
    const bool flat = window.kernel[0] == 1;
    const long long image_size = input_image(window), total = pool_units(window);
    const long long step = static_cast<long long>(gridDim.x) * kPoolThreads * kWidth;
    for (long long first = (static_cast<long long>(blockIdx.x) * kPoolThreads + threadIdx.x) * kWidth;
         first < total; first += step) {
        const int count = static_cast<int>(min(total - first, static_cast<long long>(kWidth)));
        const bool whole = count == kWidth;
        int chosen[kWidth];
        if (whole) {
            load_argmax<kWidth>(argmax, first / kWidth, chosen, window.argmax_bytes);
        } else {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                int one[1] = {0};
                if (k < count) load_argmax<1>(argmax, first + k, one, window.argmax_bytes);
                chosen[k] = one[0];
            }
        }
        const long long plane = static_cast<long long>(by_plane.quotient(first));
        const int at = static_cast<int>(first - plane * static_cast<long long>(by_plane.divisor));
        const T* image = x + plane * image_size;
        int row = window.by_output[2].quotient(at), column = at - row * columns;
        int slice = window.by_output[1].quotient(row);
        row -= slice * rows;
        // Of the first taps. A place outside is what a window that chose none has.
        int d = slice * window.stride[0] - window.pad[0];
        int h = row * window.stride[1] - window.pad[1];
        int w = column * window.stride[2] - window.pad[2];
        Vector<T, kWidth> result;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            int kh = window.by_kernel[2].quotient(chosen[k]), depth = d;
            const int column_of_tap = w + (chosen[k] - kh * window.kernel[2]) * window.dilation[2];
            if (!flat) {
                const int kd = window.by_kernel[1].quotient(kh);
                kh -= kd * window.kernel[1];
                depth += kd * window.dilation[0];
            }
            const int row_of_tap = h + kh * window.dilation[1];
            result[k] = from_accumulate<T>(accumulate_t<T>(0));
            if (static_cast<unsigned>(row_of_tap) < static_cast<unsigned>(height) &&
                static_cast<unsigned>(column_of_tap) < static_cast<unsigned>(width) &&
                static_cast<unsigned>(depth) < static_cast<unsigned>(window.input[0]) && k < count)
                result[k] = image[(depth * height + row_of_tap) * width + column_of_tap];
            w += window.stride[2];
            if (++column < columns) continue;
            column = 0;
            w = -window.pad[2];
            h += window.stride[1];
            if (++row < rows) continue;
            row = 0;
            h = -window.pad[1];
            d += window.stride[0];
            if (++slice < static_cast<int>(window.output[0])) continue;
            slice = 0;
            d = -window.pad[0];
            image += image_size;
        }
        if (whole) {
            result.store(y + first);
        } else {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                if (first + k < total) y[first + k] = result[k];
            }
        }
    }
}

// dx = sum of the gradients of the windows that chose the element, in the order of the taps.
//   dy, argmax   [images, output, groups] of Width T, window.argmax_bytes; aligned to the vector
//   dx         [images, input, groups] of Width T: every element is written once
//   lengths    [samples, axes], or null: elements beyond get 0
// Launch: as max_pool_forward; units are inputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_backward(const T* dy, const unsigned char* argmax, T* dx, const long long* lengths,
                      PoolWindow window) {
    using A = accumulate_t<T>;
    const long long image_size = output_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& input, long long unit) {
        const long long image = input.image * image_size;
        A sum[Width] = {};
        if (lengths == nullptr || PoolExtent<Index>(window, lengths, input.image).contains(input.at)) {
            for_each_covering_window(window, input, [&](int tap, Index i, const Index(&)[3]) {
                int chosen[Width];
                load_argmax<Width>(argmax, image + i, chosen, window.argmax_bytes);
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
//   dy, argmax, dx   as there
// Launch: as max_pool_forward; units are outputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_scatter(const T* dy, const unsigned char* argmax, T* dx, PoolWindow window) {
    const long long image_size = input_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        T* image = dx + output.image * image_size * Width;
        int chosen[Width];
        load_argmax<Width>(argmax, unit, chosen, window.argmax_bytes);
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

// indices = the place of the tap that each window chose, in C order within its plane (of a sample, with
// channels last); -1 for a window that chose none.
//   argmax, lengths   as above
//   indices           [images, output, groups]
// Launch: as max_pool_forward; units are outputs.
template <typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    max_pool_indices(const unsigned char* argmax, long long* indices, const long long* lengths,
                     PoolWindow window) {
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        const PoolExtent<Index> extent(window, lengths, output.image);
        int chosen[1];
        load_argmax<1>(argmax, unit, chosen, window.argmax_bytes);
        const unsigned int rows = static_cast<unsigned int>(window.kernel[1]);
        const unsigned int columns = static_cast<unsigned int>(window.kernel[2]);
        const unsigned int tap = static_cast<unsigned int>(chosen[0]), row = tap / columns;
        const unsigned int place[3] = {row / rows, row % rows, tap % columns};
        long long index = 0;
        bool inside = true;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            const AxisTaps<Index> taps(window, axis, output.at[axis], extent.size[axis]);
            const Index at = taps.origin + static_cast<Index>(place[axis]) * window.dilation[axis];
            inside = inside && at >= 0 && at < extent.size[axis];
            index = index * window.input[axis] + at;
        }
        indices[unit] = inside ? index : -1;
    });
}
