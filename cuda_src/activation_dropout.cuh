// Activation and dropout of one element, in either order: what the kernels that fuse them share.
//
// The element is kept or not; `first` says whether dropout comes before the activation, phi(D(x)), or after
// it, D(phi(x)).
#pragma once

#include "activation.cuh"
#include "dropout_rule.cuh"
#include "gradient_bits.cuh"

// Elements at a time, of the eight: two doubles, for the registers that functions of double take.
template <typename T>
constexpr int kPart = sizeof(T) == 8 ? 2 : 8;

// Of one element phi(D(x)) if First, else D(phi(x)). What is not kept is calculated all the same: lanes that
// skip it would wait for those that do not.
template <typename Phi, bool First, typename A>
__device__ __forceinline__ A forward_element(A x, bool is_kept, A scale) {
    if (First) return Phi::forward(is_kept ? x * scale : A(0));
    const A y = Phi::forward(x) * scale;
    return is_kept ? y : A(0);
}

// Of one element, with the bit that the backward of ReLU needs: whether it is kept and not <= 0. Where an
// activation has such a bit, it says all there is to say.
template <typename Phi, bool First, typename A>
__device__ __forceinline__ A forward_element(A x, bool is_kept, A scale, unsigned int bit,
                                             unsigned int& bits) {
    if constexpr (Phi::kGradientIsBit) {
        const bool passes = is_kept && !(x <= A(0));
        if (passes) bits |= bit;
        return passes ? x * scale : A(0);
    } else {
        return forward_element<Phi, First>(x, is_kept, scale);
    }
}

// Its gradient.
template <typename Phi, bool First, typename A>
__device__ __forceinline__ A backward_element(A dy, A x, bool is_kept, A scale) {
    const A dx = Phi::backward(dy * scale, First ? x * scale : x);
    return is_kept ? dx : A(0);
}

template <bool Value>
struct Constant {
    static constexpr bool kValue = Value;
};

// f(activation, order) with the order as a Constant: whether dropout comes first. One branch, as
// with_activation.
template <typename T, typename Function>
__device__ __forceinline__ void with_ordered_activation(int number, bool first, Function f) {
    with_activation<T>(number, [&](auto phi) {
        if (first) {
            f(phi, Constant<true>());
        } else {
            f(phi, Constant<false>());
        }
    });
}

// The decisions over a thread's octets of a tile: their words, or, where elements are calculated in parts,
// bits.
template <typename T, int Count>
struct OctetDecisions {
    static constexpr bool kAsBits = kPart<T> != kOctet;
    using Words = NeighbourWords<kOctet, Count>;
    Words drawn;
    unsigned int bits[Count];

    __device__ __forceinline__ OctetDecisions() {}
    __device__ __forceinline__ OctetDecisions(const DropoutRule<accumulate_t<T>>& rule, const Words& words)
        : drawn(words) {
#pragma unroll
        for (int u = 0; u < Count && kAsBits; ++u) {
            bits[u] = 0;
#pragma unroll
            for (int i = 0; i < kOctet; ++i) bits[u] |= (rule.keeps(drawn.words[u][i]) ? 1u : 0u) << i;
        }
    }

    __device__ __forceinline__ bool keeps(const DropoutRule<accumulate_t<T>>& rule, int u, int i) const {
        return kAsBits ? (bits[u] >> i & 1u) != 0 : rule.keeps(drawn.words[u][i]);
    }
};
