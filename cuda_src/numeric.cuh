// The element types, the type each is computed in, and conversions between the two.
//   const accumulate_t<T> value = to_accumulate(x[i]);
//   y[i] = from_accumulate<T>(value * scale);
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A value known when compiled, for a lambda to take:
//   run(Constant<true>());  // [&](auto flag) { f<decltype(flag)::value>(x); }
template <auto Value>
struct Constant {
    static constexpr auto value = Value;
};

// Half types are computed in float; float and double in themselves.
template <typename T>
struct Accumulate {
    using type = float;
};

template <>
struct Accumulate<double> {
    using type = double;
};

template <typename T>
using accumulate_t = typename Accumulate<T>::type;

__device__ __forceinline__ float to_accumulate(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_accumulate(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_accumulate(float value) { return value; }
__device__ __forceinline__ double to_accumulate(double value) { return value; }

// Rounds to nearest, ties to even, as NumPy does.
template <typename T>
__device__ __forceinline__ T from_accumulate(accumulate_t<T> value) {
    return value;
}

template <>
__device__ __forceinline__ __half from_accumulate<__half>(float value) {
    return __float2half_rn(value);
}

template <>
__device__ __forceinline__ __nv_bfloat16 from_accumulate<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

__device__ __forceinline__ void set_negative_infinity(float& value) { value = __int_as_float(0xff800000); }
__device__ __forceinline__ void set_negative_infinity(double& value) {
    value = __longlong_as_double(0xfff0000000000000ll);
}

// Adds a value to a sum, and the rounding error to what is lost (Knuth, TAOCP 2, 4.2.2, theorem B): the two
// together are as good as exact, however many values there are.
template <typename A>
__device__ __forceinline__ void add_compensated(A& sum, A& lost, A value) {
    const A total = sum + value, added = total - sum;
    lost += (sum - (total - added)) + (value - added);
    sum = total;
}
// The sum with what it lost, which is no number where the sum is not finite.
template <typename A>
__device__ __forceinline__ A compensated(A sum, A lost) {
    return sum - sum == A(0) ? sum + lost : sum;
}
