// What a pooling makes of many values: the largest and its place, or their sum.
//   Sum<float> some = Sum<float>::from(0), all = Sum<float>::identity();
//   for (int i = 0; i < Sum<float>::kTakes; ++i) some.take(values[i], i);
//   all = all.combine(some);
#pragma once

#include "numeric.cuh"
#include "reduce.cuh"

// The largest of some values and its position: the first of equal ones, the last of several NaN. The same
// whatever the order they come in.
template <typename A>
struct Largest {
    static constexpr int kTakes = 1024;  // see Sum: any number would do
    static constexpr bool kFolds = false;
    static constexpr int kAtOnce = 2;  // vectors of channels in flight: more would take too many registers
    A value;
    int position;

    static __device__ __forceinline__ Largest identity() {
        Largest none;
        set_negative_infinity(none.value);
        none.position = 0x7fffffff;
        return none;
    }
    // Before values from position `at` on are taken: of nothing but -inf that one is the first.
    static __device__ __forceinline__ Largest from(long long at) {
        Largest none = identity();
        none.position = static_cast<int>(at);
        return none;
    }
    __device__ __forceinline__ void take(A other, long long at) {
        // Of later positions only.
        if (other > value || other != other) {
            value = other;
            position = static_cast<int>(at);
        }
    }
    __device__ __forceinline__ Largest combine(const Largest& other) const {
        const bool nan = value != value, other_nan = other.value != other.value;
        bool keep = value > other.value || (value == other.value && position < other.position);
        if (nan || other_nan) keep = nan && !(other_nan && other.position > position);
        return keep ? *this : other;
    }
    __device__ __forceinline__ Largest shuffled_xor(int mask) const {
        return {__shfl_xor_sync(kFullWarp, value, mask), __shfl_xor_sync(kFullWarp, position, mask)};
    }
    // Kept in memory; taken back as column k of rows of `columns`, whose number was the position.
    __device__ __forceinline__ void put(Largest& kept) const {
        kept.value = value;
        kept.position = position;
    }
    __device__ __forceinline__ Largest in_row(int columns, int k) const {
        return {value, position * columns + k};
    }
    // Number i of those of chunks.
    static __device__ __forceinline__ Largest load(const unsigned char* partials, long long i) {
        const Largest& partial = reinterpret_cast<const Largest*>(partials)[i];
        return {partial.value, partial.position};
    }
    __device__ __forceinline__ void store(unsigned char* partials, long long i) const {
        reinterpret_cast<Largest*>(partials)[i].value = value;
        reinterpret_cast<Largest*>(partials)[i].position = position;
    }
};

// A sum. Values that are taken are added as they are, kTakes of them at most; sums that are combined with
// compensation.
template <typename A>
struct Sum {
    static constexpr int kTakes = 32, kAtOnce = 4;
    static constexpr bool kFolds = true;  // whether what was taken must be combined after so many
    A value, lost;

    static __device__ __forceinline__ Sum identity() { return {A(0), A(0)}; }
    static __device__ __forceinline__ Sum from(long long) { return identity(); }
    __device__ __forceinline__ void take(A other, long long) { value += other; }
    __device__ __forceinline__ Sum combine(const Sum& other) const {
        Sum both{value, lost + other.lost};
        add_compensated(both.value, both.lost, other.value);
        return both;
    }
    __device__ __forceinline__ Sum shuffled_xor(int mask) const {
        return {__shfl_xor_sync(kFullWarp, value, mask), __shfl_xor_sync(kFullWarp, lost, mask)};
    }
    __device__ __forceinline__ A times(A factor) const { return compensated(value, lost) * factor; }
    __device__ __forceinline__ void put(Sum& kept) const { kept = *this; }
    __device__ __forceinline__ Sum in_row(int, int) const { return *this; }
    static __device__ __forceinline__ Sum load(const unsigned char* partials, long long i) {
        return reinterpret_cast<const Sum*>(partials)[i];
    }
    __device__ __forceinline__ void store(unsigned char* partials, long long i) const {
        reinterpret_cast<Sum*>(partials)[i] = *this;
    }
};
