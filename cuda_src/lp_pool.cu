// Power-average pooling: (sum |x|^p)^(1/p) of each window, or the largest |x|.
#include "pool_taps.cuh"
#include "pool_window.cuh"

// value^exponent for a value of at least 0, the simple ones without a rounding too many.
template <typename A>
__device__ __forceinline__ A power(A value, A exponent) {
    if (exponent == A(1)) return value;
    if (exponent == A(2)) return value * value;
    return pow(value, exponent);
}

// y = (sum |x|^p)^(1/p) of each window, in the order of the taps; the largest |x|, and its tap, with taps.
//   x, y     [images, input, groups], [images, output, groups] T
//   taps     shape of y, window.tap_bytes each: the first of equal ones, the last NaN; null for a finite p
//   p, root  p and 1 / p
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are outputs.
template <typename T, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    lp_pool_forward(const T* x, T* y, unsigned char* taps, accumulate_t<T> p, accumulate_t<T> root,
                    PoolWindow window) {
    using A = accumulate_t<T>;
    const Index image_size = input_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        const T* image = x + output.image * image_size;
        const PoolExtent<Index> extent(window, nullptr, output.image);
        A result = A(0);
        if (taps != nullptr) {
            int chosen[1] = {0};
            bool found = false;
            for_each_tap(window, output, extent, [&](int tap, Index i) {
                const A size = fabs(to_accumulate(image[i]));
                if (!found || size > result || size != size) {
                    result = size;
                    chosen[0] = tap;
                }
                found = true;
            });
            store_taps<1>(taps, unit, chosen, window.tap_bytes);
        } else {
            for_each_tap(window, output, extent,
                         [&](int, Index i) { result += power(A(fabs(to_accumulate(image[i]))), p); });
            result = p == A(2) ? sqrt(result) : power(result, root);
        }
        y[unit] = from_accumulate<T>(result);
    });
}

// dx = sign(x) sum of dy (|x| / y)^(p - 1) over the windows of the element, in the order of the taps; 0 where
// x is 0. With taps, sign(x) times the gradients of the windows that chose it.
//   dy, y    [images, output, groups] T; y may be null with taps
//   x, dx    [images, input, groups] T: every element is written once
//   taps     shape of y, window.tap_bytes each, or null
//   exponent p - 1
// Launch: as lp_pool_forward; units are inputs.
template <typename T, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    lp_pool_backward(const T* dy, const T* x, const T* y, const unsigned char* taps, T* dx,
                     accumulate_t<T> exponent, PoolWindow window) {
    using A = accumulate_t<T>;
    const Index image_size = output_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& input, long long unit) {
        const Index image = input.image * image_size;
        const A value = to_accumulate(x[unit]);
        const A size = fabs(value);
        A sum = A(0);
        for_each_covering_window(window, input, [&](int tap, Index i, const Index(&)[3]) {
            const A gradient = to_accumulate(dy[image + i]);
            if (taps != nullptr) {
                int chosen[1];
                load_taps<1>(taps, image + i, chosen, window.tap_bytes);
                if (chosen[0] == tap) sum += gradient;
            } else {
                const A norm = to_accumulate(y[image + i]);
                const A ratio = size / (norm == A(0) ? A(1) : norm);
                sum += gradient * (size == A(0) ? A(0) : power(ratio, exponent));
            }
        });
        // NaN has no sign.
        const A sign = value != value ? value : A((value > A(0)) - (value < A(0)));
        dx[unit] = from_accumulate<T>(sign * sum);
    });
}
