// Dropout, forward and backward: both multiply by the same mask, which is regenerated, never stored.
#include "elementwise.cuh"
#include "philox.cuh"

// What decides over an element, and what becomes of it.
//   drop_below   drop when the 32-bit word is < this (0 .. 2^32, hence 64 bits)
//   scale        factor of a kept element
template <typename A>
struct DropoutRule {
    unsigned int last_dropped;  // drop_below - 1: compared in 32 bits
    bool drops_any;
    A scale;

    __device__ __forceinline__ DropoutRule(unsigned long long drop_below, A factor)
        : last_dropped(static_cast<unsigned int>(drop_below - 1)),
          drops_any(drop_below != 0),
          scale(factor) {}

    // A dropped element is +0 whatever it was: selected, not multiplied, so that NaN and infinity go too.
    __device__ __forceinline__ A apply(A value, unsigned int word) const {
        return drops_any && word <= last_dropped ? A(0) : value * scale;
    }
};

// Drops each element of x with probability drop_below / 2^32 and multiplies the rest by scale.
//   x, y     [n] T, 16-byte aligned; y may be x
//   seed, offset   Philox key and call number
//   start    index of x[0] in the whole array; a multiple of 4
// The mask depends on (seed, offset, start + i) alone: any launch gives the same bits.
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    dropout_apply(const T* x, T* y, long long n, unsigned long long drop_below, accumulate_t<T> scale,
                  unsigned long long seed, unsigned long long offset, unsigned long long start) {
    constexpr int width = kVectorWidth<T>;
    const DropoutRule<accumulate_t<T>> rule(drop_below, scale);
    const DropoutStream stream{seed, offset};
    const long long vectors = n / width;
    const long long tile = static_cast<long long>(kElementwiseThreads) * kElementwiseUnroll;
    for (long long first = blockIdx.x * tile; first < vectors; first += gridDim.x * tile) {
        Vector<T> values[kElementwiseUnroll];
#pragma unroll
        for (int u = 0; u < kElementwiseUnroll; ++u) {
            const long long v = first + u * kElementwiseThreads + threadIdx.x;
            if (v < vectors) values[u] = Vector<T>::load(x + v * width);
        }
#pragma unroll
        for (int u = 0; u < kElementwiseUnroll; ++u) {
            const long long v = first + u * kElementwiseThreads + threadIdx.x;
            if (v >= vectors) break;
            const unsigned long long g = start + static_cast<unsigned long long>(v) * width;
#pragma unroll
            for (int i = 0; i < width; i += 4) {
                const uint4 words = stream.block((g + i) >> 2);
#pragma unroll
                for (int lane = 0; lane < 4 && i + lane < width; ++lane) {
                    // Two doubles are half a block: which half, the address tells.
                    const unsigned int word =
                        word_of(words, width < 4 ? static_cast<int>(g & 3) + lane : lane);
                    values[u][i + lane] =
                        from_accumulate<T>(rule.apply(to_accumulate(values[u][i + lane]), word));
                }
            }
            values[u].store(y + v * width);
        }
    }
    const long long rest = vectors * width + threadIdx.x;
    if (blockIdx.x == 0 && rest < n) {
        const unsigned long long g = start + static_cast<unsigned long long>(rest);
        const unsigned int word = word_of(stream.block(g >> 2), static_cast<int>(g & 3));
        y[rest] = from_accumulate<T>(rule.apply(to_accumulate(x[rest]), word));
    }
}

// As dropout_apply, for a shard that starts anywhere: a thread owns the four elements of one Philox block.
//   x, y    [n] T, any alignment; y may be x
//   start   index of x[0] in the whole array
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    dropout_apply_shard(const T* x, T* y, long long n, unsigned long long drop_below, accumulate_t<T> scale,
                        unsigned long long seed, unsigned long long offset, unsigned long long start) {
    const DropoutRule<accumulate_t<T>> rule(drop_below, scale);
    const DropoutStream stream{seed, offset};
    const int skipped = static_cast<int>(start & 3);  // lanes of the first block that lie before the shard
    const long long blocks = (n + skipped + 3) / 4;
    const long long step = static_cast<long long>(gridDim.x) * kElementwiseThreads;
    for (long long block = blockIdx.x * static_cast<long long>(kElementwiseThreads) + threadIdx.x;
         block < blocks; block += step) {
        const uint4 words = stream.block((start >> 2) + static_cast<unsigned long long>(block));
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            const long long i = block * 4 + lane - skipped;
            if (i >= 0 && i < n)
                y[i] = from_accumulate<T>(rule.apply(to_accumulate(x[i]), word_of(words, lane)));
        }
    }
}
