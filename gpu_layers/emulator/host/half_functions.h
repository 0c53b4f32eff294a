// Half-precision intrinsics that the CUDA headers define for the device alone, computed in float.
#ifndef GPU_LAYERS_EMULATOR_HALF_FUNCTIONS_H_
#define GPU_LAYERS_EMULATOR_HALF_FUNCTIONS_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device_math.h"

namespace gpu_layers_emulator {

// Rounds a double to a half type in one step. float(x) may land exactly between two halves although x
// does not: round to odd first, which keeps the side on which x lay.
inline float round_to_odd(double x) {
    const float nearest = static_cast<float>(x);
    if (static_cast<double>(nearest) == x || x != x || nearest - nearest != 0.0f) return nearest;
    unsigned bits = __float_as_uint(nearest);
    const bool away_from_zero = fabs(static_cast<double>(nearest)) > fabs(x);
    if (away_from_zero) --bits;
    return __uint_as_float(bits | 1u);
}

template <typename T>
struct HalfTraits;
template <>
struct HalfTraits<__half> {
    using Pair = __half2;
    static float widen(__half x) { return __half2float(x); }
    static __half narrow(float x) { return __float2half_rn(x); }
    static __half2 pair(__half a, __half b) { return __halves2half2(a, b); }
};
template <>
struct HalfTraits<__nv_bfloat16> {
    using Pair = __nv_bfloat162;
    static float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
    static __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
    static __nv_bfloat162 pair(__nv_bfloat16 a, __nv_bfloat16 b) { return __halves2bfloat162(a, b); }
};

// The product is exact in double, and so is, for half, the sum; bfloat16's rounds once to 53 bits.
template <typename T>
T fused_multiply_add(T a, T b, T c) {
    using Traits = HalfTraits<T>;
    const double product = static_cast<double>(Traits::widen(a)) * static_cast<double>(Traits::widen(b));
    return Traits::narrow(round_to_odd(product + static_cast<double>(Traits::widen(c))));
}

}  // namespace gpu_layers_emulator

#define GPU_LAYERS_HALF_FUNCTION(T, Pair, name, pair_name, expression)                 \
    inline T name(T value) {                                                           \
        const float x = gpu_layers_emulator::HalfTraits<T>::widen(value);              \
        return gpu_layers_emulator::HalfTraits<T>::narrow(expression);                 \
    }                                                                                  \
    inline Pair pair_name(Pair value) {                                                \
        return gpu_layers_emulator::HalfTraits<T>::pair(name(value.x), name(value.y)); \
    }

#define GPU_LAYERS_HALF_FUNCTIONS(T, Pair)                                                             \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, htrunc, h2trunc, truncf(x))                                      \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hceil, h2ceil, ceilf(x))                                         \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hfloor, h2floor, floorf(x))                                      \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hrint, h2rint, nearbyintf(x))                                    \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hsqrt, h2sqrt, sqrtf(x))                                         \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hrsqrt, h2rsqrt, rsqrtf(x))                                      \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hrcp, h2rcp, 1.0f / x)                                           \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hlog, h2log, logf(x))                                            \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hlog2, h2log2, log2f(x))                                         \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hlog10, h2log10, log10f(x))                                      \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hexp, h2exp, expf(x))                                            \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hexp2, h2exp2, exp2f(x))                                         \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hexp10, h2exp10, exp10f(x))                                      \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hcos, h2cos, cosf(x))                                            \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, hsin, h2sin, sinf(x))                                            \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, htanh, h2tanh, tanhf(x))                                         \
    GPU_LAYERS_HALF_FUNCTION(T, Pair, htanh_approx, h2tanh_approx, tanhf(x))                           \
    inline T __hfma(T a, T b, T c) { return gpu_layers_emulator::fused_multiply_add(a, b, c); }        \
    inline T __hfma_relu(T a, T b, T c) {                                                              \
        const float sum = gpu_layers_emulator::HalfTraits<T>::widen(__hfma(a, b, c));                  \
        return gpu_layers_emulator::HalfTraits<T>::narrow(sum < 0.0f ? 0.0f : sum);                    \
    }                                                                                                  \
    inline T __hfma_sat(T a, T b, T c) {                                                               \
        return gpu_layers_emulator::HalfTraits<T>::narrow(                                             \
            __saturatef(gpu_layers_emulator::HalfTraits<T>::widen(__hfma(a, b, c))));                  \
    }                                                                                                  \
    inline Pair __hfma2(Pair a, Pair b, Pair c) {                                                      \
        return gpu_layers_emulator::HalfTraits<T>::pair(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); \
    }                                                                                                  \
    inline Pair __hfma2_relu(Pair a, Pair b, Pair c) {                                                 \
        return gpu_layers_emulator::HalfTraits<T>::pair(__hfma_relu(a.x, b.x, c.x),                    \
                                                        __hfma_relu(a.y, b.y, c.y));                   \
    }                                                                                                  \
    inline Pair __hfma2_sat(Pair a, Pair b, Pair c) {                                                  \
        return gpu_layers_emulator::HalfTraits<T>::pair(__hfma_sat(a.x, b.x, c.x),                     \
                                                        __hfma_sat(a.y, b.y, c.y));                    \
    }

GPU_LAYERS_HALF_FUNCTIONS(__half, __half2)
GPU_LAYERS_HALF_FUNCTIONS(__nv_bfloat16, __nv_bfloat162)
#undef GPU_LAYERS_HALF_FUNCTIONS
#undef GPU_LAYERS_HALF_FUNCTION

#endif  // GPU_LAYERS_EMULATOR_HALF_FUNCTIONS_H_
