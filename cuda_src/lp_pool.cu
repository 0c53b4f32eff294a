// Power-average pooling: (sum |x|^p)^(1/p) of each window, or the largest |x|.
#include "argmax.cuh"
#include "pool_window.cuh"
#include "power_rule.cuh"

// value^exponent for a value of at least 0.
//   whole   the exponent, of at least 0, where products are as good; below 0: they are not
template <typename C>
__device__ __forceinline__ C power(C value, C exponent, int whole) {
    if (whole < 0) return pow(value, exponent);
    C result = C(1);
#pragma unroll 1
    for (; whole > 0; whole >>= 1, value *= value) {
        if (whole & 1) result *= value;
    }
    return result;
}

// a * b * c with one rounding where there are no bits to spare.
__device__ __forceinline__ float product(float a, float b, float c) { return a * (b * c); }
__device__ __forceinline__ double product(double a, double b, double c) {
    const double bc = b * c;
    return fma(a, bc, a * fma(b, c, -bc));
}

// What the values of a window are multiplied by before their powers are taken, as two factors; neither leaves
// the range. The largest becomes 1, or, of float64, is brought to [1, 2) by a power of two, so that no value
// is rounded. (Sums of its 900th powers are within the range; for greater p values are rounded too.)
template <typename T>
struct Scale {
    using C = power_t<T>;
    static constexpr bool kExact = sizeof(T) == sizeof(double);
    C largest, first, second;

    __device__ __forceinline__ Scale(C largest_size, const PowerRule& rule) : largest(largest_size) {
        if constexpr (kExact) {
            int exponent;
            frexp(is_finite() ? largest : C(1), &exponent);
            const int half = exponent / 2;
            first = ldexp(C(1), -half);
            second = ldexp(C(1), half - (exponent - 1));
            if (rule.p > 900) second /= apply(largest);
        } else {
            // 1 over a subnormal bfloat16 is beyond float.
            first = largest < C(0x1p-100) ? C(0x1p64) : C(1);
            second = C(1) / (largest * first);
        }
    }

    // Not for windows of zeros, or with an infinity or NaN: those are their largest.
    __device__ __forceinline__ bool is_finite() const { return largest > C(0) && largest - largest == C(0); }
    __device__ __forceinline__ C apply(C size) const { return size * first * second; }
    __device__ __forceinline__ C undo(C size) const {
        return kExact ? size / second / first : size * largest;
    }
};

// A sum of values of at least 0, compensated unless the powers have bits to spare.
template <typename T>
struct PowerSum {
    using C = power_t<T>;
    C sum = C(0), rest = C(0);

    __device__ __forceinline__ void add(C value) {
        if constexpr (sizeof(C) == sizeof(accumulate_t<T>)) {
            add_compensated(sum, rest, value);
        } else {
            sum += value;
        }
    }
    __device__ __forceinline__ C value() const { return compensated(sum, rest); }
    // What the value is rounded by.
    __device__ __forceinline__ C lost() const { return (sum - value()) + rest; }
};

// y = (sum |x|^p)^(1/p) of each window, in the order of the taps; with argmax the largest |x|, and its tap.
// Or, of a window, what the gradients of its elements have in common. The sum of a window that is cut off is
// multiplied by the taps of a window over those within the padded extent.
//   x         [images, input, groups] T
//   y         [images, output, groups] T, or null
//   argmax    shape of y, window.argmax_bytes each: the first of equal ones, the last NaN; null if p < inf
//   largest   shape of y: the largest |x|; null unless slopes are needed, of a p that is neither 1 nor inf
//   slopes    shape of y: s of dy/dx = s r^(p-1), where r is |x| as Scale has it; null with largest
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are outputs.
template <typename T, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    lp_pool_forward(const T* x, T* y, unsigned char* argmax, T* largest, accumulate_t<T>* slopes,
                    PowerRule rule, PoolWindow window) {
    using A = accumulate_t<T>;
    using C = power_t<T>;
    const long long image_size = input_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
        const T* image = x + output.image * image_size;
        const PoolExtent<Index> extent(window, nullptr, output.image);
        if (rule.p == 1) {
            PowerSum<T> sum;
            for_each_tap(window, output, extent,
                         [&](int, Index i) { sum.add(C(fabs(to_accumulate(image[i])))); });
            const C result = sum.value() * rule.template share<C>(window, output.at);
            y[unit] = from_accumulate<T>(static_cast<A>(result));
            return;
        }
        A most = A(0);
        int chosen[1] = {0};
        bool found = false;
        for_each_tap(window, output, extent, [&](int tap, Index i) {
            const A size = fabs(to_accumulate(image[i]));
            if (!found || size > most || size != size) {
                most = size;
                chosen[0] = tap;
            }
            found = true;
        });
        if (argmax != nullptr) {
            store_argmax<1>(argmax, unit, chosen, window.argmax_bytes);
            y[unit] = from_accumulate<T>(most);
            return;
        }
        const Scale<T> scale(most, rule);
        // Of a window with an infinity only that one's gradient is no number; of one with NaN all are.
        C result = most, slope = most != most ? most : A(0);
        if (scale.is_finite()) {
            PowerSum<T> sum;
            for_each_tap(window, output, extent, [&](int, Index i) {
                const C size = scale.apply(fabs(to_accumulate(image[i])));
                sum.add(power(size, static_cast<C>(rule.p), rule.whole > 0 ? rule.whole : -1));
            });
            const C share = rule.template share<C>(window, output.at), total = sum.value() * share;
            C norm = rule.p == 2 ? sqrt(total) : pow(total, static_cast<C>(rule.root));
            slope = norm / total;
            if constexpr (Scale<T>::kExact) {
                // A step of Newton's, with what the roundings of the total and of the quotient left: of them
                // and of pow's error the p-th part remains.
                const C rest = fma(sum.value(), share, -total) + sum.lost() * share;
                const C power_of_norm = rule.p == 2 ? norm * norm : pow(norm, static_cast<C>(rule.p));
                const C error = rule.p == 2 ? fma(norm, norm, -power_of_norm) : C(0);
                const C step = norm * (((total - power_of_norm - error) + rest) / total) * C(rule.root);
                slope += ((fma(-slope, total, norm) + step) - slope * rest) / total;
                norm += step;
            }
            result = scale.undo(norm);
            slope *= share;
        }
        if (y != nullptr) y[unit] = from_accumulate<T>(static_cast<A>(result));
        if (slopes != nullptr) {
            largest[unit] = from_accumulate<T>(most);
            slopes[unit] = static_cast<A>(slope);
        }
    });
}

// dx = sign(x) sum of dy dy/dx over the windows of the element, in the order of the taps; 0 where x is 0.
// With argmax, sign(x) times the gradients of the windows that chose it.
//   dy             [images, output, groups] T
//   x, dx          [images, input, groups] T: every element is written once
//   argmax, largest, slopes   as lp_pool_forward gives them, or null: of p = 1 all of them
// Launch: as lp_pool_forward; units are inputs.
template <typename T, typename Index>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<Index>)
    lp_pool_backward(const T* dy, const T* x, const unsigned char* argmax, const T* largest,
                     const accumulate_t<T>* slopes, T* dx, PowerRule rule, PoolWindow window) {
    using A = accumulate_t<T>;
    using C = power_t<T>;
    const long long image_size = output_image(window);
    for_each_unit<Index>(window, [&](const PoolPosition<Index>& input, long long unit) {
        const long long image = input.image * image_size;
        const A value = to_accumulate(x[unit]);
        const A size = fabs(value);
        if (size == A(0)) {
            dx[unit] = from_accumulate<T>(A(0));
            return;
        }
        C sum = C(0);
        for_each_covering_window(window, input, [&](int tap, Index i, const Index(&output)[3]) {
            const C gradient = to_accumulate(dy[image + i]);
            if (argmax != nullptr) {
                int chosen[1];
                load_argmax<1>(argmax, image + i, chosen, window.argmax_bytes);
                if (chosen[0] == tap) sum += gradient;
            } else if (slopes == nullptr) {
                sum += gradient * rule.template share<C>(window, output);
            } else {
                const Scale<T> scale(to_accumulate(largest[image + i]), rule);
                const C slope = power(scale.apply(size), static_cast<C>(rule.p - 1), rule.whole - 1);
                sum += product(gradient, slope, C(slopes[image + i]));
            }
        });
        dx[unit] = from_accumulate<T>(signed_as(value, static_cast<A>(sum)));
    });
}
