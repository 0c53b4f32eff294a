// The activations that are not piecewise linear, for half types: polynomials in float.
//
// They consist of additions, products, fma, and operations on bits, which are the same everywhere: a GPU and
// the emulator give the same bits. There is no branch, no division and none of the hardware's approximations.
// The result is off by less than a tenth of a unit in the last place of T before it is rounded, for every x
// of T; tests/parity/test_half_activation.py looks at all of them. Other values of x, as in fused kernels,
// are between.
//   const float y = HalfGelu<__half>::forward(x);  // x is a __half in float; y is to be rounded to one
//
// Each is written by t = |x|, so that what is near 0 far below 0 is no difference of larger numbers:
//   gelu      Phi(-t) = r(t)^32. The root is nearly straight where the function falls through forty decades.
//   gelu'     Phi(-t) - t phi(t) = (t0 - t) r(t)^n; t0 is where it is 0: there it keeps its precision
//   sigmoid   s(-t) = e / (1 + e), with e = exp(-t) = 2^n (1 + f q(f)), |f| <= 1/2, and 1 / (1 + e) = p(e)
//   silu'     s(-t) s(t) (1 + e - t), where the last factor is 0 at t0
//   tanh      t r(t)
// The other half follows: Phi(t) = 1 - Phi(-t), s(t) = 1 - s(-t), tanh and the derivatives likewise. The
// coefficients make the largest error, in units in the last place of the result, as small as it can be
// (linear programming over 900 Chebyshev points).
#pragma once

#include "numeric.cuh"

// c0 + c1 t + c2 t^2 ...
__device__ __forceinline__ float polynomial(float, float c0) { return c0; }
template <typename... Rest>
__device__ __forceinline__ float polynomial(float t, float c0, Rest... rest) {
    return fma(t, polynomial(t, rest...), c0);
}

// x^(2^Count)
template <int Count>
__device__ __forceinline__ float squared(float x) {
#pragma unroll
    for (int i = 0; i < Count; ++i) x *= x;
    return x;
}

// 1 where x is positive, 0 elsewhere and for NaN: 0 times infinity is NaN, which saturates to 0.
__device__ __forceinline__ float step_at_zero(float x) { return __saturatef(x * __int_as_float(0x7f800000)); }

// NaN where x is, else `number`: of what is at hand, so that compilers have nothing to branch around.
__device__ __forceinline__ float number_or_nan(float x, float number) { return x != x ? x : number; }

// The polynomials. kGeluEnd, kGeluSlopeEnd: where what their roots are of is 0 in float, so that, as by the
// formula, an infinite x gives 0 times infinity where that is NaN.
template <typename T>
struct HalfPolynomials;

template <>
struct HalfPolynomials<__half> {
    static constexpr float kGeluEnd = 12.5f, kGeluSlopeEnd = 9.38139415f, kTanhEnd = 5.3f;
    static constexpr int kGeluSlopeSquarings = 4;

    static __device__ __forceinline__ float gelu_root(float t) {
        return polynomial(t, 0.97857219f, -0.0244036391f, -0.00940937642f, -0.000910526665f, 0.000258486951f,
                          -1.56215956e-05f, 2.73148828e-07f);
    }
    static __device__ __forceinline__ float gelu_slope_root(float t) {
        return polynomial(t, 0.974832237f, -0.0161901675f, -0.0235365722f, -0.00191432191f, 0.000933139469f,
                          -7.73829306e-05f, 1.79593326e-06f);
    }
    // (2^f - 1) / f
    static __device__ __forceinline__ float exponential(float f) {
        return polynomial(f, 0.693124175f, 0.240240991f, 0.0559064262f, 0.00958285294f);
    }
    // 1 / (1 + e)
    static __device__ __forceinline__ float reciprocal(float e) {
        return polynomial(e, 0.999992311f, -0.999189436f, 0.985863686f, -0.90436399f, 0.669368982f,
                          -0.32347852f, 0.0718108192f);
    }
    static __device__ __forceinline__ float tanh_quotient(float t) {
        return polynomial(t - 2.5f, 0.394653827f, -0.14729093f, 0.0483227745f, -0.01224354f, 0.00186201942f,
                          5.95316051e-05f, -0.000424182508f, 0.00038189732f, -0.000114331233f,
                          -1.33262047e-05f, 1.19564002e-05f, -1.19829724e-06f, -9.07495235e-08f);
    }
};

template <>
struct HalfPolynomials<__nv_bfloat16> {
    static constexpr float kGeluEnd = 16.0f, kGeluSlopeEnd = 16.0f, kTanhEnd = 4.3f;
    static constexpr int kGeluSlopeSquarings = 5;

    static __device__ __forceinline__ float gelu_root(float t) {
        return polynomial(t, 0.978576183f, -0.0244070571f, -0.00943230279f, -0.000880762644f, 0.000244143128f,
                          -1.21372705e-05f, -1.85004325e-07f, 3.02287901e-08f, -6.60219157e-10f);
    }
    static __device__ __forceinline__ float gelu_slope_root(float t) {
        return polynomial(t, 0.987325609f, -0.00804905221f, -0.012307086f, -0.000745895959f, 0.000244026145f,
                          -1.20578388e-05f, -1.9728553e-07f, 3.00542062e-08f, -6.38544218e-10f);
    }
    static __device__ __forceinline__ float exponential(float f) {
        return polynomial(f, 0.693282902f, 0.242210954f, 0.0550089367f);
    }
    static __device__ __forceinline__ float reciprocal(float e) {
        return polynomial(e, 0.999955475f, -0.996547103f, 0.954945922f, -0.773424149f, 0.42000699f,
                          -0.104959384f);
    }
    static __device__ __forceinline__ float tanh_quotient(float t) {
        return polynomial(t, 0.999846578f, 0.00424731057f, -0.348319769f, -0.00756731117f, 0.233689398f,
                          -0.169447452f, 0.0599634461f, -0.0118968366f, 0.00126981281f, -5.69567637e-05f);
    }
};

constexpr float kLog2E = 1.44269504f;
// Beyond it exp(-t) is 0 in float.
constexpr float kExpEnd = 105.0f;
// Added to a number, it leaves the nearest whole number in the last bits, plus 64.
constexpr float kRounding = 12582912.0f + 64.0f;

// x 2^n, where n + 64 is in the last bits of `rounded`: 2^64 times that first, so that the result may
// underflow.
__device__ __forceinline__ float scaled(float x, float rounded) {
    return __uint_as_float(__float_as_uint(x) + (__float_as_uint(rounded) << 23)) * 0x1p-64f;
}

// exp(-t) for t in 0 .. kExpEnd.
template <typename T>
__device__ __forceinline__ float decay(float t) {
    const float rounded = fma(t, -kLog2E, kRounding);
    const float f = fma(t, -kLog2E, kRounding - rounded);
    return scaled(fma(f, HalfPolynomials<T>::exponential(f), 1.0f), rounded);
}

template <typename T>
struct HalfSigmoid {
    // s(x), where `step` is that of x.
    static __device__ __forceinline__ float with_step(float x, float step) {
        const float e = decay<T>(fmin(fabs(x), kExpEnd));
        return fabs(fma(-e, HalfPolynomials<T>::reciprocal(e), step));
    }

    // But for NaN, which becomes a number.
    static __device__ __forceinline__ float slope_of_number(float x) {
        const float e = decay<T>(fmin(fabs(x), kExpEnd)), reciprocal = HalfPolynomials<T>::reciprocal(e);
        return e * reciprocal * reciprocal;
    }

    static __device__ __forceinline__ float forward(float x) {
        return with_step(x, number_or_nan(x, step_at_zero(x)));
    }

    static __device__ __forceinline__ float backward(float dy, float x) {
        return number_or_nan(x, dy) * slope_of_number(x);
    }
};

template <typename T>
struct HalfTanh {
    static __device__ __forceinline__ float forward(float x) {
        const float t = fmin(fabs(x), HalfPolynomials<T>::kTanhEnd);
        return copysign(number_or_nan(x, t) * HalfPolynomials<T>::tanh_quotient(t), x);
    }

    // tanh(x) = 2 s(2 x) - 1
    static __device__ __forceinline__ float backward(float dy, float x) {
        return number_or_nan(x, dy) * (4.0f * HalfSigmoid<T>::slope_of_number(x + x));
    }
};

template <typename T>
struct HalfGelu {
    static __device__ __forceinline__ float forward(float x) {
        const float t = fmin(fabs(x), HalfPolynomials<T>::kGeluEnd);
        const float root = squared<4>(HalfPolynomials<T>::gelu_root(t));
        return x * fabs(fma(-root, root, step_at_zero(x)));
    }

    static __device__ __forceinline__ float backward(float dy, float x) {
        const float t = fmin(fabs(x), HalfPolynomials<T>::kGeluSlopeEnd);
        const float power =
            squared<HalfPolynomials<T>::kGeluSlopeSquarings>(HalfPolynomials<T>::gelu_slope_root(t));
        // t0 - t, or t - t0 where x is positive. t0 is kZero / kUnit; kUnit is nearly 1.
        constexpr float kUnit = 0.99999851f, kZero = 0.751790404f;
        const float step = step_at_zero(x), distance = fma(step, -2.0f * kZero, fma(x, kUnit, kZero));
        return dy * fma(distance, power, step);
    }
};

template <typename T>
struct HalfSilu {
    static __device__ __forceinline__ float forward(float x) {
        return x * HalfSigmoid<T>::with_step(x, step_at_zero(x));
    }

    // With u = t0 - t and e0 = t0 - 1, 1 + e - t is u + (e - e0), and e - e0 = e0 (exp(t1 - t) - 1), where e0
    // is exp(-t1): both terms are as precise as they are small. kZero is t0, rounded; t1 follows from it.
    static __device__ __forceinline__ float backward(float dy, float x) {
        constexpr float kZero = 1.27846456f, kAtZero = kZero - 1.0f;
        constexpr float kLog = 1.44269466f, kLogT1 = 1.8444339f;  // log2(e), nearly, and exactly t1 times it
        const float t = fmin(fabs(x), kExpEnd);
        const float exponent = fma(t, -kLog, kLogT1), rounded = exponent + kRounding;
        const float f = exponent - (rounded - kRounding);
        const float power = scaled(kAtZero, rounded), rest = power * f,
                    q = HalfPolynomials<T>::exponential(f);
        const float e = fma(rest, q, power), difference = fma(rest, q, power - kAtZero);
        const float reciprocal = HalfPolynomials<T>::reciprocal(e), step = step_at_zero(x);
        // u + (e - e0), or its opposite where x is positive.
        const float factor = fma(fma(step, -2.0f, 1.0f), difference, fma(step, -2.0f * kZero, x + kZero));
        return dy * fma(e * reciprocal * reciprocal, factor, step);
    }
};
