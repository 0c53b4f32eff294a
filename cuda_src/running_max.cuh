// The largest values seen so far, side by side, and where: half values two at a time.
#pragma once

#include "numeric.cuh"
#include "vector_io.cuh"

// The largest of the values seen by each of Width windows, and their taps. The values stay what they are, so
// that a NaN keeps its bits.
//   RunningMax<T, Width> best;
//   best.start([&](int k) { return first[k]; }, first_taps);
//   best.take([&](int k) { return next[k]; }, tap);  // best.values(), best.taps()
template <typename T, int Width, bool InPairs = sizeof(T) == 2 && Width % 2 == 0>
struct RunningMax {
    static constexpr bool kInPairs = false;
    static constexpr int kMostTaps = 0x7fffffff;  // numbers of taps are less
    T best[Width];
    int chosen[Width];

    // The values of a vector, as start() and take() are given them.
    static __device__ __forceinline__ auto of(const Vector<T, Width>& vector) {
        return [&vector](int k) { return vector[k]; };
    }

    //   taps   numbers of the values; where those are -inf, of the windows' first taps inside the input
    template <typename Values>
    __device__ __forceinline__ void start(Values values, const int (&taps)[Width]) {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            best[k] = values(k);
            chosen[k] = taps[k];
        }
    }
    __device__ __forceinline__ void start_with_nothing(const int (&taps)[Width]) {
        accumulate_t<T> infinity;
        set_negative_infinity(infinity);
        const T nothing = from_accumulate<T>(infinity);
        start([&](int) { return nothing; }, taps);
    }
    //   values   value number k
    template <typename Values>
    __device__ __forceinline__ void take(Values values, int tap) {
#pragma unroll
        for (int k = 0; k < Width; ++k) take_one(k, values(k), tap);
    }
    //   later   of later taps
    __device__ __forceinline__ void take(const RunningMax& later) {
#pragma unroll
        for (int k = 0; k < Width; ++k) take_one(k, later.best[k], later.chosen[k]);
    }
    __device__ __forceinline__ void take_one(int k, T taken, int tap) {
        const accumulate_t<T> value = to_accumulate(taken);
        if (value > to_accumulate(best[k]) || value != value) {
            best[k] = taken;
            chosen[k] = tap;
        }
    }
    __device__ __forceinline__ void renumber(int less) {
#pragma unroll
        for (int k = 0; k < Width; ++k) chosen[k] -= less;
    }
    __device__ __forceinline__ Vector<T, Width> values() const {
        Vector<T, Width> values;
#pragma unroll
        for (int k = 0; k < Width; ++k) values[k] = best[k];
        return values;
    }
    __device__ __forceinline__ Vector<unsigned char, Width> taps() const {
        Vector<unsigned char, Width> taps;
#pragma unroll
        for (int k = 0; k < Width; ++k) taps[k] = static_cast<unsigned char>(chosen[k]);
        return taps;
    }
    // Of lane k.
    __device__ __forceinline__ accumulate_t<T> value(int k) const { return to_accumulate(best[k]); }
    __device__ __forceinline__ int tap(int k) const { return chosen[k]; }
};

// All bits of each half of `value` that is larger than that of `best`, or NaN; values are pairs in words.
template <typename T>
__device__ __forceinline__ unsigned int larger_or_nan(unsigned int value, unsigned int best) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    return __hgt2_mask(pair_of<T>(value), pair_of<T>(best)) |
           __hneu2_mask(pair_of<T>(value), pair_of<T>(value));
#else
    // The smaller of a NaN and infinity is infinity, than which only a NaN is not at most as large.
    return __hgtu2_mask(pair_of<T>(value), __hmin2(pair_of<T>(best), pair_of<T>(HalfPair<T>::kInfinity)));
#endif
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// Of bfloat16 these are instructions since compute capability 9.0 only.
template <>
__device__ __forceinline__ unsigned int larger_or_nan<__nv_bfloat16>(unsigned int value, unsigned int best) {
    const float low = __uint_as_float(value << 16), high = __uint_as_float(value & 0xffff0000u);
    const bool low_larger = low > __uint_as_float(best << 16) || low != low;
    const bool high_larger = high > __uint_as_float(best & 0xffff0000u) || high != high;
    return (low_larger ? 0xffffu : 0u) | (high_larger ? 0xffff0000u : 0u);
}
#endif

// Two half values at a time: a comparison makes a mask, a mask chooses values and taps.
template <typename T, int Width>
struct RunningMax<T, Width, true> {
    static constexpr bool kInPairs = true;
    static constexpr int kMostTaps = 0x10000, kPairs = Width / 2;
    unsigned int best[kPairs], chosen[kPairs];

    static __device__ __forceinline__ auto of(const Vector<T, Width>& vector) {
        return [&vector](int k) { return reinterpret_cast<const unsigned int*>(vector.words)[k]; };
    }

    //   pairs   pair number k in a word
    template <typename Pairs>
    __device__ __forceinline__ void start(Pairs pairs, const int (&taps)[Width]) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
            best[k] = pairs(k);
            chosen[k] = taps[2 * k] + static_cast<unsigned int>(taps[2 * k + 1]) * 0x10000u;
        }
    }
    __device__ __forceinline__ void start_with_nothing(const int (&taps)[Width]) {
        start([&](int) { return HalfPair<T>::kNegativeInfinity; }, taps);
    }
    template <typename Pairs>
    __device__ __forceinline__ void take(Pairs pairs, int tap) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) take_one(k, pairs(k), tap * 0x10001u);
    }
    __device__ __forceinline__ void take(const RunningMax& later) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) take_one(k, later.best[k], later.chosen[k]);
    }
    __device__ __forceinline__ void take_one(int k, unsigned int bits, unsigned int taps) {
        const unsigned int mask = larger_or_nan<T>(bits, best[k]);
        best[k] = (bits & mask) | (best[k] & ~mask);
        chosen[k] = (taps & mask) | (chosen[k] & ~mask);
    }
    __device__ __forceinline__ void renumber(int less) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) chosen[k] -= less * 0x10001u;
    }
    __device__ __forceinline__ Vector<T, Width> values() const {
        Vector<T, Width> values;
        memcpy(&values, best, sizeof(values));
        return values;
    }
    __device__ __forceinline__ Vector<unsigned char, Width> taps() const {
        // The lower bytes of four halves.
        unsigned int words[kPairs / 2];
#pragma unroll
        for (int i = 0; i < kPairs / 2; ++i) words[i] = __byte_perm(chosen[2 * i], chosen[2 * i + 1], 0x6420);
        Vector<unsigned char, Width> taps;
        memcpy(&taps, words, sizeof(taps));
        return taps;
    }
    __device__ __forceinline__ float value(int k) const {
        Vector<T, 2> pair;
        pair.words[0] = best[k / 2];
        return widened(pair, k % 2);
    }
    __device__ __forceinline__ int tap(int k) const {
        return k % 2 == 0 ? chosen[k / 2] & 0xffffu : chosen[k / 2] >> 16;
    }
};
