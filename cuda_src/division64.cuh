// Division of any index by a number that the host knows, in some fifteen instructions, none of them a call.
#pragma once

// For dividends below 2^63. Source: Granlund and Montgomery, "Division by invariant integers using
// multiplication", PLDI 1994: the quotient is (mulhi(n, multiplier) + n) >> shift with shift =
// ceil(log2(divisor)) and multiplier = floor(2^64 * (2^shift - divisor) / divisor) + 1.
//   const unsigned long long row = columns.quotient(i);
//   const unsigned long long column = i - row * columns.divisor;
struct Divisor64 {
    unsigned long long divisor, multiplier, shift;

    __device__ __forceinline__ unsigned long long quotient(unsigned long long n) const {
        return (__umul64hi(n, multiplier) + n) >> static_cast<unsigned int>(shift);
    }
};
static_assert(sizeof(Divisor64) == 24, "the launcher packs it with this size");
