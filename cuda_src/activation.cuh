// Each activation and its derivative, once. A is float or double.
//
// forward(x) is phi(x), backward(dy, x) is dy * phi'(x). Relu and LeakyRelu are exact; errors of the others
// follow from those of the functions they call (CUDA C++ Programming Guide, mathematical functions): exp 2
// units in the last place in float and 1 in double, tanh 2 and 2, erfc 4 and 5, and 2 for the division.
//   with_activation<T>(number, [&](auto phi) {
//       y = phi.forward(x);
//       dx = phi.backward(dy, x);
//   });
//
// Of half types those that are not piecewise linear are calculated otherwise: half_activation.cuh.
#pragma once

#include "half_activation.cuh"

__device__ __forceinline__ float quotient_of(float x, float y) { return __fdividef(x, y); }  // y in [1, 4]
__device__ __forceinline__ double quotient_of(double x, double y) { return x / y; }

struct Identity {
    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return x;
    }

    template <typename A>
    static __device__ __forceinline__ A backward(A dy, A) {
        return dy;
    }
};

// max(x, 0): every zero is +0 and NaN stays NaN. Derivative: 1 where x is not <= 0 (NaN included).
struct Relu {
    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return x <= A(0) ? A(0) : x;
    }

    // x: the input, or the output, which is positive where the input is.
    template <typename A>
    static __device__ __forceinline__ A backward(A dy, A x) {
        return x <= A(0) ? A(0) : dy;
    }
};

// x where it is positive, 0.01 x elsewhere.
struct LeakyRelu {
    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return x > A(0) ? x : x * A(0.01);
    }

    template <typename A>
    static __device__ __forceinline__ A backward(A dy, A x) {
        return x > A(0) ? dy : dy * A(0.01);
    }
};

// 1 / (1 + exp(-x)). With e = exp(-|x|), which does not overflow, there is no cancellation anywhere.
struct Sigmoid {
    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        const A e = exp(-fabs(x));
        return quotient_of(x >= A(0) ? A(1) : e, A(1) + e);
    }

    // phi' = e / (1 + e)^2
    template <typename A>
    static __device__ __forceinline__ A backward(A dy, A x) {
        const A e = exp(-fabs(x)), sum = A(1) + e;
        return dy * quotient_of(e, sum * sum);
    }
};

struct Tanh {
    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return tanh(x);
    }

    // phi' = 4 e / (1 + e)^2 with e = exp(-2 |x|)
    template <typename A>
    static __device__ __forceinline__ A backward(A dy, A x) {
        const A e = exp(A(-2) * fabs(x)), sum = A(1) + e;
        return dy * (A(4) * quotient_of(e, sum * sum));
    }
};

// What rounding leaves of -x / sqrt(2), and of -x^2 / 2: erfc and exp magnify it by up to x^2. Nothing for
// double, whose functions leave no registers for it.
struct GeluRest {
    static __device__ __forceinline__ double of_erfc(double erfc_z, double, double) { return erfc_z; }
    static __device__ __forceinline__ double of_exp(double exp_e, double, double) { return exp_e; }

    // z: -x / sqrt(2), rounded. erfc'(z) is about -2 z erfc(z) from 1 on; below, the rest does not count.
    // What underflows has no more bits.
    static __device__ __forceinline__ float of_erfc(float erfc_z, float x, float z) {
        // The last factor: -1 / sqrt(2) less what it is in float.
        const float rest = fma(x, -0.70710678118654752440f, -z) + x * -1.2101617104478970e-8f;
        return z > 1.0f && erfc_z > 0.0f ? fma(erfc_z, -2.0f * z * rest, erfc_z) : erfc_z;
    }
    // e: -x^2 / 2, rounded. Likewise.
    static __device__ __forceinline__ float of_exp(float exp_e, float x, float e) {
        return exp_e > 0.0f ? fma(exp_e, fma(-0.5f * x, x, -e), exp_e) : exp_e;
    }
};

// x Phi(x), where Phi is the normal distribution function: erfc(-x / sqrt(2)) / 2.
struct Gelu {
    template <typename A>
    static __device__ __forceinline__ A distribution(A x) {
        const A z = x * A(-0.70710678118654752440);
        return A(0.5) * GeluRest::of_erfc(erfc(z), x, z);
    }

    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return x * distribution(x);
    }

    // phi' = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
    template <typename A>
    static __device__ __forceinline__ A backward(A dy, A x) {
        const A e = A(-0.5) * x * x;
        const A density = A(0.39894228040143267794) * GeluRest::of_exp(exp(e), x, e);
        return dy * (distribution(x) + x * density);
    }
};

// x sigmoid(x)
struct Silu {
    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return x * Sigmoid::forward(x);
    }

    // phi' = sigmoid(x) + x sigmoid'(x)
    template <typename A>
    static __device__ __forceinline__ A backward(A dy, A x) {
        const A e = exp(-fabs(x)), sum = A(1) + e;
        return dy * (quotient_of(x >= A(0) ? A(1) : e, sum) + x * quotient_of(e, sum * sum));
    }
};

// Those that are not piecewise linear, as elements of T are calculated.
template <typename T, bool IsHalf = sizeof(T) == 2>
struct Curved {
    using OfSigmoid = Sigmoid;
    using OfTanh = Tanh;
    using OfGelu = Gelu;
    using OfSilu = Silu;
};
template <typename T>
struct Curved<T, true> {
    using OfSigmoid = HalfSigmoid<T>;
    using OfTanh = HalfTanh<T>;
    using OfGelu = HalfGelu<T>;
    using OfSilu = HalfSilu<T>;
};

// f(activation) for the activation of this number: one branch, the same way for all threads, around work on
// many elements. The launcher gives the numbers (kernels/activation_dropout.py). This one knows those that
// are not piecewise linear; that of transformers is looked for first.
//   T   of the elements, which what is calculated is rounded to
template <typename T, typename Function>
__device__ __forceinline__ void with_curved_activation(int number, Function f) {
    if (__builtin_expect(number == 4, 1)) {
        f(typename Curved<T>::OfGelu());
    } else if (number == 2) {
        f(typename Curved<T>::OfSigmoid());
    } else if (number == 3) {
        f(typename Curved<T>::OfTanh());
    } else {
        f(typename Curved<T>::OfSilu());
    }
}

constexpr int kNoActivation = -1;

// Likewise, for any activation, or none.
template <typename T, typename Function>
__device__ __forceinline__ void with_activation(int number, Function f) {
    if (__builtin_expect(number > 1, 1)) {
        with_curved_activation<T>(number, f);
    } else if (number == 1) {
        f(LeakyRelu());
    } else if (number == 0) {
        f(Relu());
    } else {
        f(Identity());
    }
}

// What that activation makes +0 of.
template <typename A>
__device__ __forceinline__ A becomes_zero(int number) {
    A result(0);
    if (number == 2) set_negative_infinity(result);  // sigmoid
    return result;
}

// The activations that are a straight line on either side of 0, none among them, without a branch.
template <typename A>
struct PiecewiseLinearActivation {
    A slope;     // where x is negative
    bool clips;  // ReLU: results are +0 there, were x infinite

    __device__ __forceinline__ explicit PiecewiseLinearActivation(int number)
        : slope(number == kNoActivation ? A(1) : A(0.01)), clips(number == 0) {}

    __device__ __forceinline__ A forward(A x) const {
        const A low = clips ? A(0) : x * slope;
        return x <= A(0) ? low : x;
    }

    __device__ __forceinline__ A backward(A dy, A x) const {
        const bool passes = x > A(0) || (clips && x != x);
        return passes ? dy : (clips ? A(0) : dy * slope);
    }
};

// The backward of those whose gradient is dy or 0: ReLU, and none.
template <typename A>
struct ClippingActivation {
    bool clips;

    __device__ __forceinline__ explicit ClippingActivation(int number) : clips(number == 0) {}

    __device__ __forceinline__ A backward(A dy, A x) const { return clips && x <= A(0) ? A(0) : dy; }
};
