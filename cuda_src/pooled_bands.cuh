// The gradients that max pooling gives to rows, gathered by bands into shared memory, from where the threads
// of a block take them in the order of the positions: that of batch norm's sums.
//
// A band is some rows of inputs, of one image and of a tile's channels. A thread gathers those of a strip, up
// which it takes each row of windows once. An input alone would look for its windows, and read them again.
//
// For windows with at most one after the inputs' own that reaches into them, along either axis.
#pragma once

#include "batch_norm_backward.cuh"
#include "window_gradients.cuh"

// Where a thread's next vector is, with those after it kChannelThreads apart; and how far in x the next band
// is.
struct BandWalk {
    const uint4* next;
    long long ahead;
};

// A source of gradients, see batch_norm_backward.cuh. While a band is taken the next one is asked for.
//   dy, argmax, window   as in batch_norm_max_pool_backward.cu; units are squares of Stride x Stride inputs
//   strip                of a thread: so many of those, one below the other
//   norms                of the block, for those of its channels: there are no registers for them meanwhile
//   slots                likewise, for the vectors of a band: of each position, those of the threads x
template <typename T, int Width, int Kernel, int Stride, int Pad>
struct BandGradients {
    static constexpr bool kWhole = true, kIsArray = false;
    using Tile = PoolTile<T, Kernel, Stride, Pad, true>;
    static_assert(Width == Tile::kWidth, "a vector of channels is a lane of a tile each");
    using Loaded = Vector<T, Width>;
    const T* dy;
    const unsigned char* argmax;
    const PoolWindow& window;
    int strip;
    Normalization<accumulate_t<T>>* norms;
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
    //   body     has norms of them
    template <int Loads, typename Body>
    __device__ __forceinline__ void for_each(const NhwcLayout<Width>& layout, bool exists, long long channel,
                                             long long rank, Body& body) const {
        const int height = static_cast<int>(window.input[1]), width = static_cast<int>(window.input[2]);
        const int threads = static_cast<int>(blockDim.y), shift = __ffs(threads) - 1;
        // As many strips as threads have work with.
        const int most_rows = max(1, threads / static_cast<int>(window.units[2])) * strip * Stride;
        // Positions and channels can be counted in 32 bits.
        const int own_channel = static_cast<int>(channel);
        const BlockRows of_block(layout, rank);
        const int end = static_cast<int>(of_block.begin + of_block.rows), plane = height * width;
        Normalization<accumulate_t<T>>* const own_norms = norms + threadIdx.x * Width;
        if (threadIdx.y == 0) {
#pragma unroll
            for (int k = 0; k < Width; ++k) own_norms[k] = body.norms[k];
        }
        int position = static_cast<int>(of_block.begin) + threadIdx.y;
        int image = static_cast<int>(of_block.begin) / plane;
        int row = (static_cast<int>(of_block.begin) - image * plane) / width / Stride * Stride;
        int first = image * plane + row * width;
        if (exists) ask(layout, own_channel, image, row, first, min(first + most_rows * width, end));
#pragma unroll 1
        while (first < end) {
            const int left = (end - first + width - 1) / width;
            const int rows = min(min(most_rows, height - row), left), values = rows * width;
            if (exists) fill(own_channel, image, row, rows);
            __syncthreads();
            take_norms(own_norms, body.norms);
            const int place = position - first;
            const int count = max(min(end - first, values) - place + threads - 1, 0) >> shift;
            walk.ahead = first + 2 * values <= layout.rows ? values * layout.channels : 0;
            walk.next = slots + place * static_cast<int>(blockDim.x) + threadIdx.x;
            if (exists)
                take_all(Share<Loads>(count, 0, 1), body, position * layout.channels + own_channel,
                         threads * layout.channels);
            __syncthreads();
            position += count * threads;
            first += values;
            row += rows;
            if (row == height) row = 0, ++image;
        }
    }

  private:
    // Asks for what the first band needs: inputs first .. end - 1, and the windows from their row on.
    __device__ __forceinline__ void ask(const NhwcLayout<Width>& layout, int channel, int image, int row,
                                        int first, int end) const {
        if (!asks_for_sector(threadIdx.x * kVectorBytes, kVectorBytes)) return;
        const int threads = static_cast<int>(blockDim.y), output_width = static_cast<int>(window.output[2]);
        const int width = static_cast<int>(window.input[2]);
        const int output_rows = static_cast<int>(window.images * window.output[1]);
        const int first_row = image * static_cast<int>(window.output[1]) + row / Stride;
        const int rows = (end - first) / width / Stride + 2;
        const int last = min(first_row + rows, output_rows) * output_width;
#pragma unroll 1
        for (int place = first_row * output_width + threadIdx.y; place < last; place += threads) {
            prefetch(dy + place * layout.channels + channel);
            prefetch(argmax + place * layout.channels + channel);
        }
#pragma unroll 1
        for (int place = first + threadIdx.y; place < end; place += threads)
            prefetch(x + place * layout.channels + channel);
    }

    template <typename Norms>
    static __device__ __forceinline__ void take_norms(const Normalization<accumulate_t<T>>* kept,
                                                      Norms& norms) {
        constexpr int kWords = static_cast<int>(sizeof(Norms) / sizeof(uint4));
        static_assert(sizeof(Norms) % sizeof(uint4) == 0, "of a thread are whole words");
        uint4 words[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(kept)[i];
        memcpy(&norms, words, sizeof(norms));
    }

    // The gradients of some rows of inputs.
    __device__ __forceinline__ void fill(int channel, int image, int row, int rows) const {
        using Row = WindowRow<T, Tile, false>;
        using Sums = GatheredRow<T, Tile, false>;
        const int width = static_cast<int>(window.input[2]), columns = static_cast<int>(window.units[2]);
        const int output_height = static_cast<int>(window.output[1]),
                  output_width = static_cast<int>(window.output[2]);
        const int groups = static_cast<int>(window.groups), lanes = static_cast<int>(blockDim.x);
        const int blocks = (rows + Stride - 1) / Stride, units = (blocks + strip - 1) / strip * columns;
        // An image has fewer than 2^31 values.
        const int row_values = output_width * groups * Width;
        const long long before = static_cast<long long>(image) * output_height * row_values + channel;
        const T* const image_dy = dy + before;
        const unsigned char* const image_argmax = argmax + before;
        const int rows_left = (static_cast<int>(window.images) - image) * output_height;
        const bool asks = asks_for_sector(threadIdx.x * kVectorBytes, kVectorBytes);
#pragma unroll 1
        for (int unit = threadIdx.y; unit < units; unit += blockDim.y) {
            const int below = window.by_units[2].quotient(unit), column = unit - below * columns;
            const int begin = row / Stride + below * strip;
            const int end = min(begin + strip, row / Stride + blocks);
            uint4* const first = slots + column * Stride * lanes + threadIdx.x;
            gather_up<Tile, Sums>(
                begin, end, row + rows,
                [&](int h) {
                    const int nearest = min(h, output_height - 1);
                    // Of the next band, which may be of the next image.
                    if (asks && h + blocks < rows_left && column < output_width) {
                        const int next = (h + blocks) * row_values + column * groups * Width;
                        prefetch(image_dy + next);
                        prefetch(image_argmax + next);
                    }
                    return Row(Row::template read<false>(image_dy, image_argmax, nearest * row_values, column,
                                                         output_width, groups, h == nearest));
                },
                [&](const Row& windows, int i, int r, Sums& sums) { sums.add(windows, i, r, 0); },
                [&](int gathered, int r, const Sums& sums) {
#pragma unroll
                    for (int c = 0; c < Stride; ++c) {
                        // As max_pool_backward writes it.
                        if (column * Stride + c < width)
                            first[((gathered - row) * width + c) * lanes] = sums.column(r, c).words[0];
                    }
                });
        }
    }
};

template <typename T, int Loads, int Width, int Kernel, int Stride, int Pad, typename Body>
__device__ __forceinline__ void for_each_with_gradient(
    const BandGradients<T, Width, Kernel, Stride, Pad>& source, const NhwcLayout<Width>& layout, bool exists,
    const ChannelBlock<long long>& block, Body& body, const AllPositions&) {
    source.template for_each<Loads>(layout, exists, block.channel, block.rank, body);
}
