// Division of an index by a number that the host knows: two or three instructions instead of some twenty.
#pragma once

// For dividends and divisors below 2^31. Source: Granlund and Montgomery, "Division by invariant integers
// using multiplication", PLDI 1994: the quotient is (mulhi(n, multiplier) + n) >> shift with shift =
// ceil(log2(divisor)) and multiplier = floor(2^32 * (2^shift - divisor) / divisor) + 1.
struct Divisor32 {
    unsigned int divisor, multiplier, shift;

    __device__ __forceinline__ int quotient(int n) const {
        const unsigned int dividend = static_cast<unsigned int>(n);
        return static_cast<int>((__umulhi(dividend, multiplier) + dividend) >> shift);
    }
};
static_assert(sizeof(Divisor32) == 12, "the launcher packs it with this size");

// index / divisor for either type of index. `fast` is of the same divisor; 64-bit indices, those of images of
// 2^31 elements and more, are divided as they are.
//   const Index row = quotient(i, window.by_units[2], columns);
//   const Index column = i - row * columns;
__device__ __forceinline__ int quotient(int index, const Divisor32& fast, long long) {
    return fast.quotient(index);
}
__device__ __forceinline__ long long quotient(long long index, const Divisor32&, long long divisor) {
    return index / divisor;
}
