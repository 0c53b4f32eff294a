// The backward of max pooling by wide windows, 1 apart: of Kernel x Kernel, with Kernel / 2 before the first
// element.
//
// An input is in Kernel^2 windows, and few of them chose it. So windows are looked at once: each adds its
// gradient where its tap points to, in sums that a thread has for itself in shared memory, where an index
// costs nothing.
#include "pool_tile.cuh"

// A tile of inputs: kColumns neighbours in a row, of one channel.
template <int Kernel, bool ChannelsLast>
struct WideTile {
    static constexpr int kColumns = 8;
    static constexpr int kPad = Kernel / 2, kWindows = kColumns + Kernel - 1;
    // Sums of a thread: of the rows that a row of windows reaches, and of all columns that its windows reach,
    // so that none of their taps has to be looked at. Those beside the tile are for nothing.
    static constexpr int kRow = kWindows + 2 * kPad, kSums = Kernel * kRow;
    static constexpr int kThreads = 128;
};

// Blocks that must fit on a multiprocessor at once: 40 KB are shared in each.
constexpr int kWideBlocks = 5;

// A row of windows over a tile: their gradients and taps, 0 outside. For channels last one value after the
// other, by bytes: an index would be scaled anew for each.
template <typename T, int Kernel, bool ChannelsLast>
struct WideRow {
    using Tile = WideTile<Kernel, ChannelsLast>;
    PoolRow<T, Tile::kWindows, 1> gradients;
    int taps[Tile::kWindows];

    //   dy, argmax   the row; the others as in PoolRow::load
    template <bool Whole>
    __device__ __forceinline__ void load(const T* dy, const unsigned char* argmax, int first, int size,
                                         int groups, bool inside) {
        const Vector<T, 1> nothing = filled<T, 1>(from_accumulate<T>(0));
        if constexpr (!ChannelsLast) {
            const Vector<unsigned char, 1> no_tap = filled<unsigned char, 1>(0);
            PoolRow<unsigned char, Tile::kWindows, 1> bytes;
            gradients.template load<Whole, Tile::kPad, Tile::kColumns>(dy, first, size, 1, inside, nothing);
            bytes.template load<Whole, Tile::kPad, Tile::kColumns>(argmax, first, size, 1, inside, no_tap);
#pragma unroll
            for (int j = 0; j < Tile::kWindows; ++j) taps[j] = bytes.at[j][0];
        } else {
            const long long step = groups;
            const char* from = reinterpret_cast<const char*>(dy + first * step);
            const unsigned char* tap = argmax + first * step;
#pragma unroll
            for (int j = 0; j < Tile::kWindows; ++j) {
                gradients.at[j] = nothing;
                taps[j] = 0;
                if (inside && first + j >= 0 && first + j < size) {
                    gradients.at[j] = Vector<T, 1>::load(reinterpret_cast<const T*>(from));
                    taps[j] = *tap;
                }
                from += step * static_cast<int>(sizeof(T));
                tap += step;
            }
        }
    }
};

// As max_pool_backward.
//   dy, argmax   [images, height, width, channels] T, and of one byte; aligned to 16 bytes
//   dx           the same shape: every element is written once
//   strip        rows of inputs of a thread
// Each row of windows is read once, from the last to the first, as are those of a row: what is added to an
// input comes in the order of the taps. A row of inputs is written once the windows that reach it have been
// seen. Sums of rows beside the strip, like those of columns beside the tile, are for nothing.
template <bool Whole, typename T, int Kernel, bool ChannelsLast>
__device__ __forceinline__ void scatter_wide(const T* dy, const unsigned char* argmax, T* dx, int strip,
                                             const PoolWindow& window, accumulate_t<T>* sums) {
    using A = accumulate_t<T>;
    using Tile = WideTile<Kernel, ChannelsLast>;
    constexpr int kColumns = Tile::kColumns, kPad = Tile::kPad, kRow = Tile::kRow, kThreads = Tile::kThreads;
    const PoolPlane<1, ChannelsLast> plane(window.input, window.groups);
    const long long total = pool_units(window);
    A* own = sums + threadIdx.x;
    for (long long unit = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x; unit < total;
         unit += static_cast<long long>(gridDim.x) * kThreads) {
        const PoolPosition<int> tile = pool_position<int>(window, unit, 0);
        const long long before = plane.before(tile);
        const int left = tile.at[2] * kColumns;
        const int begin = tile.at[1] * strip, end = min(begin + strip, plane.height);
#pragma unroll
        for (int i = 0; i < Tile::kSums; ++i) own[i * kThreads] = A(0);
        const auto load = [&](int h) {
            const long long start = before + plane.row(0, h);
            WideRow<T, Kernel, ChannelsLast> row;
            row.template load<Whole>(dy + start, argmax + start, left - kPad, plane.width, plane.groups,
                                     h >= 0 && h < plane.height);
            return row;
        };
        // Rows that are further up, for channels last: each thread asks for another column, and those of a
        // warp for all of its channels.
        constexpr int kAskers = kSectorBytes / static_cast<int>(sizeof(T));
        const int nth = min(static_cast<int>(threadIdx.x) % kAskers, Tile::kWindows - 1);
        const int column = min(max(left + nth - (kAskers > kColumns ? kPad : 0), 0), plane.width - 1);
        const int asked = min(end - 1 + kPad, plane.height), rows_asked = asked - max(begin - kPad, 0);
        const long long first_asked = before + plane.row(0, asked - 1) + column * plane.groups;
        RowsAhead<T, 1> gradients_ahead(dy + first_asked, -plane.row(0, 1), 0, ChannelsLast ? rows_asked : 0);
        RowsAhead<unsigned char, 1> taps_ahead(argmax + first_asked, -plane.row(0, 1), 0,
                                               ChannelsLast ? rows_asked : 0);
        // Where the sums of the first row are that the windows of row h reach.
        int slot = 0;
        WideRow<T, Kernel, ChannelsLast> next = load(end - 1 + kPad);
#pragma unroll 1
        for (int h = end - 1 + kPad; h >= begin - kPad; --h) {
            // The row above is on its way while this one is looked at.
            const WideRow<T, Kernel, ChannelsLast> windows = next;
            next = load(h - 1);
            if constexpr (ChannelsLast) {
                gradients_ahead.ask();
                taps_ahead.ask();
            }
#pragma unroll
            for (int j = Tile::kWindows - 1; j >= 0; --j) {
                const int tap = windows.taps[j], row = tap * ((2048 + Kernel - 1) / Kernel) >> 11;
                const unsigned int at = slot + j + tap + row * (kRow - Kernel);
                // Beyond the last sum it is smaller without them all; of a byte that is no tap it is none.
                const unsigned int within = min(min(at, at - Tile::kSums), Tile::kSums - 1u);
                own[static_cast<int>(within) * kThreads] += widened(windows.gradients.at[j], 0);
            }
            // The last row that these windows reach is done, and its sums are for the row above the first
            // one.
            const int done = h + kPad;
            slot = slot == 0 ? Tile::kSums - kRow : slot - kRow;
            PoolRow<T, kColumns, 1> result;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                A* const sum = own + (slot + 2 * kPad + i) * kThreads;
                result.at[i][0] = from_accumulate<T>(*sum);
                *sum = A(0);
            }
            if (done >= end) continue;
            T* const target = dx + before + plane.row(0, done);
            if constexpr (!ChannelsLast) {
                result.template store<Whole>(target, left, plane.width, 1);
            } else {
                const long long step = plane.groups;
                char* to = reinterpret_cast<char*>(target + left * step);
#pragma unroll
                for (int i = 0; i < kColumns; ++i, to += step * static_cast<int>(sizeof(T))) {
                    if (left + i < plane.width) result.at[i].store(reinterpret_cast<T*>(to));
                }
            }
        }
    }
}

// Launch: 1-D, WideTile's kThreads, any number of blocks (grid-stride); units are strips of tiles of inputs.
template <typename T, int Kernel, bool ChannelsLast>
__global__ void __launch_bounds__((WideTile<Kernel, ChannelsLast>::kThreads), kWideBlocks)
    max_pool_backward_wide(const T* dy, const unsigned char* argmax, T* dx, int strip, PoolWindow window) {
    using Tile = WideTile<Kernel, ChannelsLast>;
    __shared__ accumulate_t<T> sums[Tile::kSums * Tile::kThreads];
    if (!ChannelsLast && static_cast<int>(window.input[2]) % Tile::kColumns == 0) {
        scatter_wide<!ChannelsLast, T, Kernel, ChannelsLast>(dy, argmax, dx, strip, window, sums);
    } else {
        scatter_wide<false, T, Kernel, ChannelsLast>(dy, argmax, dx, strip, window, sums);
    }
}
