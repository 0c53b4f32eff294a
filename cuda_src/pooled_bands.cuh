// The gradients that max pooling gives to rows, gathered by bands into shared memory, from where the threads
// of a block take them in the order of the positions: that of batch norm's sums.
//
// A band is some rows of Stride x Stride inputs, of one image and of a tile's channels. The windows over such
// inputs are read once for all of them. An input alone would look for its windows, and read them again.
//
// For windows with at most one after the inputs' own that reaches into them, along either axis.
#pragma once

#include "argmax.cuh"
#include "batch_norm_backward.cuh"
#include "pool_window.cuh"

// Where a thread's next vector is, with those after it kChannelThreads apart; and how far in x the next band
// is.
struct BandWalk {
    const uint4* next;
    long long ahead;
};

// A source of gradients, see batch_norm_backward.cuh. While a band is taken the next one is asked for.
//   dy, argmax, window   as in batch_norm_max_pool_backward.cu; units are squares of Stride x Stride inputs
//   slots                of the block, for the vectors of a band: of each position, those of the threads x
template <typename T, int Width, int Kernel, int Stride, int Pad>
struct BandGradients {
    static constexpr bool kWhole = true, kIsArray = false;
    // Windows over the inputs along an axis: their own, and the next.
    static constexpr int kOver = 1 + (Stride - 1 + Pad) / Stride;
    static_assert(Kernel - 1 - Pad < Stride && kOver <= 2, "no window before their own reaches them");
    using Loaded = Vector<T, Width>;
    const T* dy;
    const unsigned char* argmax;
    const PoolWindow& window;
    uint4* slots;
    const T* x;
    BandWalk& walk;

    __device__ __forceinline__ Loaded load(long long i) const {
        Loaded vector;
        vector.words[0] = *walk.next;
        walk.next += kChannelThreads;
        if (asks_for_sector(threadIdx.x * kVectorBytes, kVectorBytes)) prefetch(x + i + walk.ahead);
        return vector;
    }
    __device__ __forceinline__ const Loaded& of(const Loaded& loaded) const { return loaded; }

    // Calls body for the rows of a block, as for_each_in_block does.
    //   exists   whether this thread has channels
    template <int Loads, typename Body>
    __device__ __forceinline__ void for_each(const NhwcLayout<Width>& layout, bool exists, long long channel,
                                             long long rank, Body& body) const {
        const int height = static_cast<int>(window.input[1]), width = static_cast<int>(window.input[2]);
        const int threads = static_cast<int>(blockDim.y), shift = __ffs(threads) - 1;
        // As many of their rows as threads have work with.
        const int most_rows = max(1, threads / static_cast<int>(window.units[2])) * Stride;
        const BlockRows of_block(layout, rank);
        const long long end = of_block.begin + of_block.rows, plane = static_cast<long long>(height) * width;
        long long position = of_block.begin + threadIdx.y;
        int image = static_cast<int>(of_block.begin / plane);
        int row = static_cast<int>(of_block.begin - image * plane) / width / Stride * Stride;
        long long first = image * plane + row * width;
#pragma unroll 1
        while (first < end) {
            const int rows = min(most_rows, height - row);
            if (exists) fill(layout, channel, image, row, rows);
            __syncthreads();
            const int place = static_cast<int>(position - first);
            const int values = static_cast<int>(min(end - first, static_cast<long long>(rows * width)));
            const int count = max(values - place + threads - 1, 0) >> shift;
            walk.ahead = first + 2 * rows * width <= layout.rows ? rows * width * layout.channels : 0;
            walk.next = slots + place * static_cast<int>(blockDim.x) + threadIdx.x;
            if (exists)
                take_all(Share<Loads>(count, 0, 1), body, position * layout.channels + channel,
                         threads * layout.channels);
            __syncthreads();
            position += count * threads;
            first += rows * width;
            row += rows;
            if (row == height) row = 0, ++image;
        }
    }

  private:
    // The gradients of some rows of inputs.
    __device__ __forceinline__ void fill(const NhwcLayout<Width>& layout, long long channel, int image,
                                         int row, int rows) const {
        const int width = static_cast<int>(window.input[2]), columns = static_cast<int>(window.units[2]);
        const int output_height = static_cast<int>(window.output[1]),
                  output_width = static_cast<int>(window.output[2]);
        const int units = (rows + Stride - 1) / Stride * columns, lanes = static_cast<int>(blockDim.x);
        const int groups = static_cast<int>(window.groups), group = static_cast<int>(channel) / Width;
        const int places = static_cast<int>(window.images) * output_height * output_width * groups;
#pragma unroll 1
        for (int unit = threadIdx.y; unit < units; unit += blockDim.y) {
            const int below = window.by_units[2].quotient(unit), column = unit - below * columns;
            // Where there is no window another one is read, and none of its taps taken. In vectors, which can
            // be counted in 32 bits.
            const int h = row / Stride + below, nearest_w = min(column, output_width - 1);
            const int nearest_h = min(h, output_height - 1);
            const int at = ((image * output_height + nearest_h) * output_width + nearest_w) * groups + group;
            const long long ahead = at + (kOver - 1 + (rows + Stride - 1) / Stride) * output_width * groups;
            if (ahead < places && asks_for_sector(threadIdx.x * kVectorBytes, kVectorBytes)) {
                prefetch(dy + ahead * Width);
                prefetch(argmax + ahead * Width);
            }
            Vector<T, Width> gradients[kOver][kOver];
            Vector<unsigned char, Width> taps[kOver][kOver];
#pragma unroll
            for (int i = 0; i < kOver; ++i) {
#pragma unroll
                for (int j = 0; j < kOver; ++j) {
                    const bool exists = h + i < output_height && column + j < output_width;
                    const int vector = exists ? at + (i * output_width + j) * groups : at;
                    gradients[i][j] = Vector<T, Width>::load(dy + static_cast<long long>(vector) * Width);
                    taps[i][j] =
                        Vector<unsigned char, Width>::load(argmax + static_cast<long long>(vector) * Width);
                    if (!exists) taps[i][j] = filled<unsigned char, Width>(0xff);
                }
            }
            uint4* const first = slots + (below * Stride * width + column * Stride) * lanes + threadIdx.x;
#pragma unroll
            for (int r = 0; r < Stride; ++r) {
                accumulate_t<T> sums[Stride][Width] = {};
                // From the last window to the first, whose taps ascend.
#pragma unroll
                for (int i = (r + Pad) / Stride; i >= 0; --i) {
#pragma unroll
                    for (int j = kOver - 1; j >= 0; --j) {
                        const int kh = r + Pad - i * Stride;
                        if (kh < Kernel) add(gradients[i][j], taps[i][j], kh, Pad - j * Stride, sums);
                    }
                }
#pragma unroll
                for (int c = 0; c < Stride; ++c) {
                    // As max_pool_backward writes it.
                    const Vector<T, Width> gathered = rounded<T>(sums[c]);
                    if (below * Stride + r < rows && column * Stride + c < width)
                        first[(r * width + c) * lanes] = gathered.words[0];
                }
            }
        }
    }

    // Adds what a window gives a row of inputs, the first of which is under its tap (kh, first).
    __device__ __forceinline__ void add(const Vector<T, Width>& gradients,
                                        const Vector<unsigned char, Width>& taps, int kh, int first,
                                        accumulate_t<T> (&sums)[Stride][Width]) const {
#pragma unroll
        for (int c = 0; c < Stride; ++c) {
            const int kw = first + c;
            if (kw < 0 || kw >= Kernel) continue;
            // The number of columns is Kernel, which the compiler must not know: it would compare bytes one
            // by one.
            const unsigned int sought = repeated_tap(kh * window.kernel[2] + kw);
#pragma unroll
            for (int k = 0; k < Width; ++k)
                if (is_repeated_tap(taps, k, sought)) sums[c][k] += widened(gradients, k);
        }
    }
};

// Blocks come from the end where these would.
template <typename T, int Loads, bool, int Width, int Kernel, int Stride, int Pad, typename Body>
__device__ __forceinline__ void for_each_with_gradient(
    const BandGradients<T, Width, Kernel, Stride, Pad>& source, const NhwcLayout<Width>& layout, bool exists,
    const ChannelBlock<long long>& block, Body& body, const AllPositions&) {
    source.template for_each<Loads>(layout, exists, block.channel, block.rank, body);
}
