// CUDA's arithmetic functions that the host's C library lacks. Approximate intrinsics are exact here.
#ifndef GPU_LAYERS_EMULATOR_DEVICE_MATH_H_
#define GPU_LAYERS_EMULATOR_DEVICE_MATH_H_

#include <math.h>

#include <cfenv>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace gpu_layers_emulator {

template <typename To, typename From>
__forceinline__ To reinterpret_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

// Conversions saturate and turn NaN into 0 on the device; in C++ both are undefined.
template <typename To, typename From>
__forceinline__ To saturating_cast(From rounded) {
    const From limit = ldexp(From(1), static_cast<int>(sizeof(To) * CHAR_BIT - std::is_signed<To>::value));
    if (rounded != rounded) return To(0);
    if (rounded >= limit)
        return static_cast<To>(~(To(1) << (sizeof(To) * CHAR_BIT - 1)) | -!std::is_signed<To>::value);
    if (std::is_signed<To>::value && rounded < -limit)
        return static_cast<To>(To(1) << (sizeof(To) * CHAR_BIT - 1));
    if (!std::is_signed<To>::value && rounded < From(0)) return To(0);
    return static_cast<To>(rounded);
}

}  // namespace gpu_layers_emulator

// --- Bits -----------------------------------------------------------------------------------------------
__forceinline__ unsigned __float_as_uint(float x) {
    return gpu_layers_emulator::reinterpret_bits<unsigned>(x);
}
__forceinline__ int __float_as_int(float x) { return gpu_layers_emulator::reinterpret_bits<int>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return gpu_layers_emulator::reinterpret_bits<float>(x); }
__forceinline__ float __int_as_float(int x) { return gpu_layers_emulator::reinterpret_bits<float>(x); }
__forceinline__ long long __double_as_longlong(double x) {
    return gpu_layers_emulator::reinterpret_bits<long long>(x);
}
__forceinline__ double __longlong_as_double(long long x) {
    return gpu_layers_emulator::reinterpret_bits<double>(x);
}
__forceinline__ int __double2hiint(double x) { return static_cast<int>(__double_as_longlong(x) >> 32); }
__forceinline__ int __double2loint(double x) { return static_cast<int>(__double_as_longlong(x)); }
__forceinline__ double __hiloint2double(int high, int low) {
    return __longlong_as_double(static_cast<long long>(
        static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low)));
}

__forceinline__ int __popc(unsigned x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
__forceinline__ int __clzll(long long x) {
    return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __ffsll(long long x) { return __builtin_ffsll(x); }
__forceinline__ unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1u) << (31 - bit);
    return result;
}
__forceinline__ unsigned long long __brevll(unsigned long long x) {
    return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
           __brev(static_cast<unsigned>(x >> 32));
}
// Picks four of the eight bytes of (y:x), by the lower three bits of each part of the selector.
__forceinline__ unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned choice = selector >> (4 * i) & 7u;
        result |= (static_cast<unsigned>(bytes >> (8 * choice)) & 0xffu) << (8 * i);
    }
    return result;
}
__forceinline__ unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}
__forceinline__ unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}

// --- Integers -------------------------------------------------------------------------------------------
__forceinline__ unsigned __umulhi(unsigned x, unsigned y) {
    return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32);
}
__forceinline__ int __mulhi(int x, int y) { return static_cast<int>(static_cast<int64_t>(x) * y >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    __extension__ typedef unsigned __int128 Wide;
    return static_cast<unsigned long long>(static_cast<Wide>(x) * y >> 64);
}
__forceinline__ long long __mul64hi(long long x, long long y) {
    __extension__ typedef __int128 Wide;
    return static_cast<long long>(static_cast<Wide>(x) * y >> 64);
}
__forceinline__ unsigned __umul24(unsigned x, unsigned y) { return (x & 0xffffffu) * (y & 0xffffffu); }
__forceinline__ int __mul24(int x, int y) {
    const auto low = [](int v) { return static_cast<int32_t>(static_cast<uint32_t>(v) << 8) >> 8; };
    return static_cast<int>(static_cast<unsigned>(low(x)) * static_cast<unsigned>(low(y)));
}
__forceinline__ unsigned __usad(unsigned x, unsigned y, unsigned z) { return (x > y ? x - y : y - x) + z; }

// --- min and max: CUDA has them for every pair of built-in types, and for floating point they skip NaN ----
#define GPU_LAYERS_MIN_MAX(type)                                       \
    __forceinline__ type min(type a, type b) { return b < a ? b : a; } \
    __forceinline__ type max(type a, type b) { return a < b ? b : a; }
GPU_LAYERS_MIN_MAX(int)
GPU_LAYERS_MIN_MAX(unsigned)
GPU_LAYERS_MIN_MAX(long)
GPU_LAYERS_MIN_MAX(unsigned long)
GPU_LAYERS_MIN_MAX(long long)
GPU_LAYERS_MIN_MAX(unsigned long long)
#undef GPU_LAYERS_MIN_MAX
#define GPU_LAYERS_MIXED_MIN_MAX(result, left, right)               \
    __forceinline__ result min(left a, right b) {                   \
        return min(static_cast<result>(a), static_cast<result>(b)); \
    }                                                               \
    __forceinline__ result max(left a, right b) {                   \
        return max(static_cast<result>(a), static_cast<result>(b)); \
    }
GPU_LAYERS_MIXED_MIN_MAX(unsigned, int, unsigned)
GPU_LAYERS_MIXED_MIN_MAX(unsigned, unsigned, int)
GPU_LAYERS_MIXED_MIN_MAX(unsigned long, long, unsigned long)
GPU_LAYERS_MIXED_MIN_MAX(unsigned long, unsigned long, long)
GPU_LAYERS_MIXED_MIN_MAX(unsigned long long, long long, unsigned long long)
GPU_LAYERS_MIXED_MIN_MAX(unsigned long long, unsigned long long, long long)
#undef GPU_LAYERS_MIXED_MIN_MAX
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }
__forceinline__ double min(double a, double b) { return fmin(a, b); }
__forceinline__ double max(double a, double b) { return fmax(a, b); }
__forceinline__ double min(float a, double b) { return fmin(a, b); }
__forceinline__ double max(float a, double b) { return fmax(a, b); }
__forceinline__ double min(double a, float b) { return fmin(a, b); }
__forceinline__ double max(double a, float b) { return fmax(a, b); }
__forceinline__ unsigned umin(unsigned a, unsigned b) { return min(a, b); }
__forceinline__ unsigned umax(unsigned a, unsigned b) { return max(a, b); }

// --- Floating point ---------------------------------------------------------------------------------------
__forceinline__ double rsqrt(double x) { return 1.0 / sqrt(x); }
__forceinline__ float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
__forceinline__ float rsqrt(float x) { return rsqrtf(x); }
__forceinline__ double rcbrt(double x) { return 1.0 / cbrt(x); }
__forceinline__ float rcbrtf(float x) { return static_cast<float>(1.0 / cbrt(static_cast<double>(x))); }
__forceinline__ float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
__forceinline__ float fdividef(float x, float y) { return x / y; }
__forceinline__ float __fdividef(float x, float y) { return x / y; }
__forceinline__ float normcdff(float x) {
    return static_cast<float>(0.5 * erfc(-static_cast<double>(x) * 0.70710678118654752440));
}
__forceinline__ double normcdf(double x) { return 0.5 * erfc(-x * 0.70710678118654752440); }
#ifndef __USE_GNU
__forceinline__ float exp10f(float x) { return static_cast<float>(pow(10.0, static_cast<double>(x))); }
__forceinline__ double exp10(double x) { return pow(10.0, x); }
#endif
__forceinline__ void sincospif(float x, float* sine, float* cosine) {
    const double angle = 3.14159265358979323846 * static_cast<double>(fmodf(x, 2.0f));
    *sine = static_cast<float>(sin(angle));
    *cosine = static_cast<float>(cos(angle));
}

// Macros, because the C library declares functions of these very names.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __tanhf(x) tanhf(x)
#define __sincosf(x, s, c) sincosf(x, s, c)

__forceinline__ float __fadd_rn(float x, float y) { return x + y; }
__forceinline__ float __fsub_rn(float x, float y) { return x - y; }
__forceinline__ float __fmul_rn(float x, float y) { return x * y; }
__forceinline__ float __fdiv_rn(float x, float y) { return x / y; }
__forceinline__ float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fsqrt_rn(float x) { return sqrtf(x); }
__forceinline__ float __frsqrt_rn(float x) { return rsqrtf(x); }
__forceinline__ double __dadd_rn(double x, double y) { return x + y; }
__forceinline__ double __dsub_rn(double x, double y) { return x - y; }
__forceinline__ double __dmul_rn(double x, double y) { return x * y; }
__forceinline__ double __ddiv_rn(double x, double y) { return x / y; }
__forceinline__ double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
__forceinline__ double __drcp_rn(double x) { return 1.0 / x; }
__forceinline__ double __dsqrt_rn(double x) { return sqrt(x); }

// --- Conversions: _rn to nearest even, _rz towards 0, _rd down, _ru up -------------------------------------
#define GPU_LAYERS_TO_INTEGER(from, from_name, to, to_name)                               \
    __forceinline__ to __##from_name##2##to_name##_rn(from x) {                           \
        return gpu_layers_emulator::saturating_cast<to>(static_cast<from>(nearbyint(x))); \
    }                                                                                     \
    __forceinline__ to __##from_name##2##to_name##_rz(from x) {                           \
        return gpu_layers_emulator::saturating_cast<to>(static_cast<from>(trunc(x)));     \
    }                                                                                     \
    __forceinline__ to __##from_name##2##to_name##_rd(from x) {                           \
        return gpu_layers_emulator::saturating_cast<to>(static_cast<from>(floor(x)));     \
    }                                                                                     \
    __forceinline__ to __##from_name##2##to_name##_ru(from x) {                           \
        return gpu_layers_emulator::saturating_cast<to>(static_cast<from>(ceil(x)));      \
    }
GPU_LAYERS_TO_INTEGER(float, float, int, int)
GPU_LAYERS_TO_INTEGER(float, float, unsigned, uint)
GPU_LAYERS_TO_INTEGER(float, float, long long, ll)
GPU_LAYERS_TO_INTEGER(float, float, unsigned long long, ull)
GPU_LAYERS_TO_INTEGER(double, double, int, int)
GPU_LAYERS_TO_INTEGER(double, double, unsigned, uint)
GPU_LAYERS_TO_INTEGER(double, double, long long, ll)
GPU_LAYERS_TO_INTEGER(double, double, unsigned long long, ull)
#undef GPU_LAYERS_TO_INTEGER
__forceinline__ float __int2float_rn(int x) { return static_cast<float>(x); }
__forceinline__ float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
__forceinline__ float __ll2float_rn(long long x) { return static_cast<float>(x); }
__forceinline__ float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
__forceinline__ double __int2double_rn(int x) { return x; }
__forceinline__ double __uint2double_rn(unsigned x) { return x; }
__forceinline__ double __ll2double_rn(long long x) { return static_cast<double>(x); }
__forceinline__ double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }
__forceinline__ float __double2float_rn(double x) { return static_cast<float>(x); }

#endif  // GPU_LAYERS_EMULATOR_DEVICE_MATH_H_
