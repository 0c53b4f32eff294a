// Mean and variance without cancellation, and sums of gradients: what batch norm reduces to.
#pragma once

#include "reduce.cuh"

// What values are multiplied by where squares of them, or sums of these, would leave the range: a power of
// two for which those of the largest do not, and those of values that need it do not vanish. Where a channel
// has up to 2^31 values, no sum of what is moderate leaves the range, nor one of what was lowered.
template <typename A>
struct Lowering;
template <>
struct Lowering<float> {
    static constexpr float kDown = 0x1p-84f, kUp = 0x1p84f, kModerate = 0x1p44f;
};
template <>
struct Lowering<double> {
    static constexpr double kDown = 0x1p-560, kUp = 0x1p560, kModerate = 0x1p460;
};

template <typename A>
__device__ __forceinline__ bool is_finite(A value) {
    return value - value == A(0);
}

// Count, mean and variance of some values. The mean is relative to an origin that all parts share, one of the
// channel's values: its rounding error is then small against their spread, however far from 0 they are. A
// negative count says that all values were lowered: the variance itself may be out of range where 1 over its
// root is not.
//
// Parts are merged by the corrected two-pass algorithm (Chan, Golub and LeVeque, 1983): first a centre, which
// is near the mean; then their sums about the centre, of deviations and of squares, of which the former
// correct the mean and the variance.
//   const auto centre = Centre<A>::of(total of own.about_origin());
//   const Sums<A, 3> sums = total of own.about(centre.mean);
template <typename A>
struct Moments {
    A count, mean, var;

    __device__ __forceinline__ bool is_lowered() const { return count < A(0); }

    __device__ __forceinline__ Moments lowered() const {
        constexpr A kDown = Lowering<A>::kDown;
        return is_lowered() ? *this : Moments{-count, mean * kDown, var * kDown * kDown};
    }

    // How many there are, and the sum of their deviations from the origin.
    __device__ __forceinline__ Sums<A, 2> about_origin() const {
        const A n = fabs(count);
        return {{n, n * mean}};
    }
    // How many there are, and the sums of their deviations from a centre and of the squares of these.
    __device__ __forceinline__ Sums<A, 3> about(A centre) const {
        const A n = fabs(count), deviation = mean - centre;
        return {{n, n * deviation, n * fma(deviation, deviation, var)}};
    }
};

// How many values there are, and a number near their mean, relative to the origin; of no values 0.
template <typename A>
struct Centre {
    A count, inverse_count, mean;

    static __device__ __forceinline__ Centre at(A mean, A count) {
        return {count, count == A(0) ? A(0) : A(1) / count, mean};
    }
    static __device__ __forceinline__ Centre of(const Sums<A, 2>& about_origin) {
        Centre centre = at(A(0), about_origin.of[0]);
        centre.mean = about_origin.of[1] * centre.inverse_count;
        return centre;
    }

    // From the sums of deviations from this centre and of their squares.
    __device__ __forceinline__ Moments<A> moments(A deviations, A squares, bool lowered) const {
        const A correction = deviations * inverse_count;
        const A var = fma(-deviations, correction, squares) * inverse_count;
        // Rounding may leave a variance of nothing slightly negative; NaN must stay NaN.
        return {lowered ? -count : count, mean + correction, var < A(0) ? A(0) : var};
    }
};

// Sums over the values of one thread, relative to the first of them: no division a value, and no cancellation
// unless the thread's own values are far apart.
//   MomentsAccumulator<A> own;
//   own.shift = values[0];
//   for (int i = 0; i < count; ++i) own.add(values[i]);
//   own.shift -= origin;
//   const Sums<A, 2> sums = own.about_origin(count);
template <typename A>
struct MomentsAccumulator {
    A shift, sum, sum_of_squares;

    __device__ __forceinline__ MomentsAccumulator() : shift(0), sum(0), sum_of_squares(0) {}

    // shift must have been set to the first value. The caller counts.
    __device__ __forceinline__ void add(A value) {
        const A deviation = value - shift;
        sum += deviation;
        sum_of_squares = fma(deviation, deviation, sum_of_squares);
    }

    // Once shift is relative to the origin: how many there are, and the sum of their deviations from the
    // origin.
    __device__ __forceinline__ Sums<A, 2> about_origin(int count) const {
        const A n = static_cast<A>(count);
        return {{n, fma(n, shift, sum)}};
    }
    // The sums of their deviations from a centre, likewise, and of the squares of these.
    __device__ __forceinline__ Sums<A, 2> about(int count, A centre) const {
        const A distance = shift - centre;
        const A deviations = fma(static_cast<A>(count), distance, sum);
        return {{deviations, fma(distance, deviations + sum, sum_of_squares)}};
    }

    // Whether squares of these values, or their sums, may be too large to go on.
    __device__ __forceinline__ bool is_beyond(const Sums<A, 2>& about_origin) const {
        constexpr A kModerate = Lowering<A>::kModerate;
        return !(fabs(about_origin.of[1]) < kModerate && sum_of_squares < kModerate * kModerate);
    }
};

// Sums of gradients: of dz, and of dz * (x - mean).
template <typename A>
__device__ __forceinline__ void add_gradient(Sums<A, 2>& sums, A dz, A deviation) {
    sums.of[0] += dz;
    sums.of[1] = fma(dz, deviation, sums.of[1]);
}
