// Activation and dropout of one element, in either order: what the kernels that fuse them share.
//
// The element is kept or not; `first` says whether dropout comes before the activation, phi(D(x)), or after it,
// D(phi(x)).
#pragma once

#include "activation.cuh"
#include "dropout_rule.cuh"

// Elements at a time, of the eight: two doubles, for the registers that functions of double take.
template <typename T>
constexpr int kPart = sizeof(T) == 8 ? 2 : 8;

// D(phi(x)) or phi(D(x)) of one element.
template <typename Phi, typename A>
__device__ __forceinline__ A forward_element(A x, bool is_kept, bool first, A scale) {
    const A before = is_kept || !first ? x * (first ? scale : A(1)) : A(0);
    return is_kept || first ? Phi::forward(before) * (first ? A(1) : scale) : A(0);
}

// Its gradient.
template <typename Phi, typename A>
__device__ __forceinline__ A backward_element(A dy, A x, bool is_kept, bool first, A scale) {
    return is_kept ? Phi::backward(dy * scale, x * (first ? scale : A(1))) : A(0);
}
