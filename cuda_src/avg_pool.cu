// Average pooling.
#include "pool_divisor.cuh"
#include "pool_window.cuh"

// Adds the sums of a row, which begin anew.
template <typename A, int Width>
__device__ __forceinline__ void add_row(A (&row)[Width], A (&sum)[Width]) {
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        sum[k] += row[k];
        row[k] = A(0);
    }
}

// Windows of more taps inside are summed with compensation, some taps of a row at a time; so are the shares
// of an input that may be in more windows.
constexpr int kFew = 128, kAtOnce = 32;

// Whether a window may have more taps inside, or an input be in more windows.
//   sizes   of the input, or of the output
__device__ __forceinline__ bool has_many(const PoolWindow& window, const long long (&sizes)[3]) {
    long long most = 1;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis)
        most *= min(static_cast<long long>(window.kernel[axis]), sizes[axis]);
    return most > kFew;
}

// As add_row, with what the sums lose.
template <typename A, int Width>
__device__ __forceinline__ void add_row_compensated(A (&row)[Width], A (&sum)[Width], A (&lost)[Width]) {
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        add_compensated(sum[k], lost[k], row[k]);
        row[k] = A(0);
    }
}

// y = sum of each window over its divisor; each row of taps is summed first (see kFew).
//   x         [images, input, groups] of Width T, aligned to the vector
//   y         [images, output, groups] of Width T
//   lengths   [samples, axes], or null: sizes of each sample, beyond which nothing counts
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are outputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    avg_pool_forward(const T* x, T* y, const long long* lengths, PoolWindow window,
                     PoolDivisor<accumulate_t<T>> divisor) {
    using A = accumulate_t<T>;
    const long long image_size = input_image(window);
    const bool many = has_many(window, window.input);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        const T* image = x + output.image * image_size * Width;
        const PoolExtent<Index> extent(window, lengths, output.image);
        A sum[Width] = {}, row[Width] = {};
        const auto take = [&](Index i) {
            const Vector<T, Width> values = Vector<T, Width>::load(image + static_cast<long long>(i) * Width);
#pragma unroll
            for (int k = 0; k < Width; ++k) row[k] += widened(values, k);
        };
        if (many) {
            A lost[Width] = {};
            const auto fold = [&] { add_row_compensated(row, sum, lost); };
            const auto visit = [&](int tap, Index i) {
                take(i);
                if (tap % kAtOnce == 0) fold();
            };
            for_each_tap(window, output, extent, visit, fold);
#pragma unroll
            for (int k = 0; k < Width; ++k) sum[k] = compensated(sum[k], lost[k]);
        } else {
            for_each_tap(window, output, extent, [&](int, Index i) { take(i); }, [&] { add_row(row, sum); });
        }
        const A factor = divisor.of(window, output.at, extent);
        Vector<T, Width> result;
#pragma unroll
        for (int k = 0; k < Width; ++k) result[k] = from_accumulate<T>(sum[k] * factor);
        result.store(y + unit * Width);
    });
}

// dx = sum of dy over its divisor of the windows over the element, each row of them first (see kFew).
//   dy        [images, output, groups] of Width T, aligned to the vector
//   dx        [images, input, groups] of Width T: every element is written once
//   lengths   [samples, axes], or null: elements beyond get 0
// Launch: as avg_pool_forward; units are inputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    avg_pool_backward(const T* dy, T* dx, const long long* lengths, PoolWindow window,
                      PoolDivisor<accumulate_t<T>> divisor) {
    using A = accumulate_t<T>;
    const long long image_size = output_image(window);
    const bool many = has_many(window, window.output);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& input, long long unit) {
        const long long image = input.image * image_size;
        const PoolExtent<Index> extent(window, lengths, input.image);
        A sum[Width] = {}, row[Width] = {};
        const auto take = [&](Index i, const Index(&output)[3]) {
            const A factor = divisor.of(window, output, extent);
            const Vector<T, Width> gradients = Vector<T, Width>::load(dy + (image + i) * Width);
#pragma unroll
            for (int k = 0; k < Width; ++k) row[k] += widened(gradients, k) * factor;
        };
        if (extent.contains(input.at) && many) {
            A lost[Width] = {};
            const auto fold = [&] { add_row_compensated(row, sum, lost); };
            const auto visit = [&](int, Index i, const Index(&output)[3]) {
                take(i, output);
                if (output[2] % kAtOnce == 0) fold();
            };
            for_each_covering_window(window, input, visit, fold);
#pragma unroll
            for (int k = 0; k < Width; ++k) sum[k] = compensated(sum[k], lost[k]);
        } else if (extent.contains(input.at)) {
            for_each_covering_window(
                window, input, [&](int, Index i, const Index(&output)[3]) { take(i, output); },
                [&] { add_row(row, sum); });
        }
        Vector<T, Width> result;
#pragma unroll
        for (int k = 0; k < Width; ++k) result[k] = from_accumulate<T>(sum[k]);
        result.store(dx + unit * Width);
    });
}

// As avg_pool_backward, of windows that do not overlap: each is read once, and all of its inputs written from
// there.
//   dy, dx   as there
// Launch: as avg_pool_forward; units are outputs.
template <typename T, int Width, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    avg_pool_scatter(const T* dy, T* dx, PoolWindow window, PoolDivisor<accumulate_t<T>> divisor) {
    using A = accumulate_t<T>;
    const long long image_size = input_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        T* image = dx + output.image * image_size * Width;
        const A factor = divisor.of(window, output.at, PoolExtent<Index>(window, nullptr, output.image));
        const Vector<T, Width> gradients = Vector<T, Width>::load(dy + unit * Width);
        Vector<T, Width> shares;
        // A sum, for it makes +0 of -0.
#pragma unroll
        for (int k = 0; k < Width; ++k) shares[k] = from_accumulate<T>(widened(gradients, k) * factor + A(0));
        for_each_own_input(window, output, [&](int tap, Index i) {
            Vector<T, Width> result;
#pragma unroll
            for (int k = 0; k < Width; ++k) result[k] = tap < 0 ? from_accumulate<T>(A(0)) : shares[k];
            result.store(image + static_cast<long long>(i) * Width);
        });
    });
}
