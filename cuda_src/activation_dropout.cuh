// Activation and dropout in either order: what the kernels that fuse them share.
#pragma once

#include "activation.cuh"
#include "dropout_rule.cuh"
#include "gradient_bits.cuh"

// Elements at a time, of the eight: two doubles, for the registers that functions of double take.
template <typename T>
constexpr int kPart = sizeof(T) == 8 ? 2 : 8;

// f(value, u, i) for value i of vector u, of all of them.
//   for_each_value(values, [&](A& value, int u, int i) { value *= scale; });
template <int Count, int Width, typename A, typename Function>
__device__ __forceinline__ void for_each_value(A (&values)[Count][Width], Function f) {
#pragma unroll
    for (int u = 0; u < Count; ++u) {
#pragma unroll
        for (int i = 0; i < Width; ++i) f(values[u][i], u, i);
    }
}

// In place of values of x, in what T is computed in, phi(D(x)) if `first`, else D(phi(x)): what is dropped is
// replaced by what becomes +0, so that its decision is not needed any more. It is calculated all the same:
// lanes that skip it would wait for those that do not. The order is a branch around products, not around all
// of it, so that each activation is there once.
//   activation   its number, see with_activation, or kNoActivation
//   keeps        called with u and i: whether that value is kept
//   passing      of ReLU bit `done` + i of passing[u] is set where the value is kept and not <= 0, which is
//                all that its backward needs
//   IsStraight   it is ReLU or none
//
//   A values[kVectors][kOctet];  // filled from x
//   activate_and_drop<T>(values, activation, first, rule.scale,
//                        [&](int u, int i) { return decisions.keeps(rule, u, i); }, passing, 0);
template <typename T, bool IsStraight = false, int Count, int Width, typename A, typename Keeps>
__device__ __forceinline__ void activate_and_drop(A (&values)[Count][Width], int activation, bool first,
                                                  A scale, Keeps keeps, unsigned int (&passing)[Count],
                                                  int done) {
    if (!IsStraight && activation > 0) {
        if (first) {
            for_each_value(values, [&](A& x, int u, int i) { x = keeps(u, i) ? x * scale : A(0); });
        } else {
            const A dropped = becomes_zero<A>(activation);
            for_each_value(values, [&](A& x, int u, int i) { x = keeps(u, i) ? x : dropped; });
        }
        with_activation<T>(activation, [&](auto phi) {
            for_each_value(values, [&](A& x, int, int) { x = decltype(phi)::forward(x); });
        });
        if (!first) for_each_value(values, [&](A& x, int, int) { x *= scale; });
    } else {
        const bool clips = activation == 0;
        for_each_value(values, [&](A& x, int u, int i) {
            const bool passes = keeps(u, i) && !(clips && x <= A(0));
            if (passes) passing[u] |= 1u << (done + i);
            x = passes ? x * scale : A(0);
        });
    }
}

// In place of values of dy their gradients at x, which is changed too: +0 where they are not kept.
//   keeps        called with u and i: whether that value is kept
//   IsStraight   it is dy: activation is kNoActivation
template <typename T, bool IsStraight = false, int Count, int Width, typename A, typename Keeps>
__device__ __forceinline__ void activation_gradient(A (&gradients)[Count][Width], A (&x)[Count][Width],
                                                    int activation, bool first, A scale, Keeps keeps) {
    const auto with = [&](auto phi) {
        for_each_value(gradients, [&](A& dy, int u, int i) {
            const A dx = decltype(phi)::backward(dy * scale, x[u][i]);
            dy = keeps(u, i) ? dx : A(0);
        });
    };
    if constexpr (IsStraight) {
        with(Identity());
    } else {
        if (first) for_each_value(x, [&](A& value, int, int) { value *= scale; });
        with_activation<T>(activation, with);
    }
}

// Words that one comparison keeps, where nothing is dropped: a second one would be another way through all
// that follows.
template <typename A, int Count, int Width>
__device__ __forceinline__ void keep_all_if_none_is_dropped(const DropoutRule<A>& rule,
                                                            unsigned int (&words)[Count][Width]) {
    if (rule.drops_any == 0) for_each_value(words, [](unsigned int& word, int, int) { word = ~0u; });
}

// The decisions over a thread's octets of a tile: their words, or, where elements are calculated in parts,
// bits. If not Drops, nothing is dropped, and nothing drawn.
template <typename T, int Count, bool Drops = true>
struct OctetDecisions {
    static constexpr bool kAsBits = kPart<T> != kOctet;
    using Rule = DropoutRule<accumulate_t<T>>;
    NeighbourWords<kOctet, Count> drawn;
    unsigned int bits[Count];

    // words   called for them
    template <typename Words>
    __device__ __forceinline__ void draw(const Rule& rule, Words words) {
        if constexpr (Drops) {
            drawn = words();
            keep_all_if_none_is_dropped(rule, drawn.words);
#pragma unroll
            for (int u = 0; u < Count && kAsBits; ++u) {
                bits[u] = 0;
#pragma unroll
                for (int i = 0; i < kOctet; ++i) bits[u] |= (word_keeps(rule, u, i) ? 1u : 0u) << i;
            }
        }
    }

    __device__ __forceinline__ bool keeps(const Rule& rule, int u, int i) const {
        return !Drops || (kAsBits ? (bits[u] >> i & 1u) != 0 : word_keeps(rule, u, i));
    }

  private:
    __device__ __forceinline__ bool word_keeps(const Rule& rule, int u, int i) const {
        return drawn.words[u][i] > rule.last_dropped;
    }
};

// f(drops), whether anything is dropped as a Constant.
template <typename A, typename Function>
__device__ __forceinline__ void with_or_without_dropping(const DropoutRule<A>& rule, Function f) {
    if (rule.drops_any != 0) {
        f(Constant<true>());
    } else {
        f(Constant<false>());
    }
}
