// Each activation and its derivative, once.
#pragma once

// max(x, 0), of which every zero is +0 and NaN stays NaN. Derivative: 1 where the output is not <= 0.
struct Relu {
    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return x <= A(0) ? A(0) : x;
    }

    // y: the output.
    template <typename A>
    static __device__ __forceinline__ A backward(A dy, A y) {
        return y <= A(0) ? A(0) : dy;
    }
};
