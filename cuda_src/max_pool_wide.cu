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
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kWideBlocks = 4;
#else
constexpr int kWideBlocks = 5;
#endif

// Where the windows of a row over a tile are read for channels last, and how far the sum of each one's tap 0
// is from that of the first one. Of those outside the image others are read, and added to no sum.
//   Whole   the tile's own columns are inside
template <int Kernel, bool Whole>
struct WideColumns {
    using Tile = WideTile<Kernel, true>;
    int columns[Tile::kWindows], sums[Tile::kWindows];

    __device__ __forceinline__ WideColumns(int left, int width) {
#pragma unroll
        for (int j = 0; j < Tile::kWindows; ++j) {
            const int column = left - Tile::kPad + j;
            const bool own = Whole && j >= Tile::kPad && j < Tile::kPad + Tile::kColumns;
            columns[j] = own ? column : min(max(column, 0), width - 1);
            sums[j] = columns[j] == column ? j : 2 * Tile::kSums;
        }
    }
};

// A row of windows over a tile: their gradients and taps, of planes 0 outside.
template <typename T, int Kernel, bool ChannelsLast, bool Whole>
struct WideRow {
    using Tile = WideTile<Kernel, ChannelsLast>;
    PoolRow<T, Tile::kWindows, 1> gradients;
    int taps[Tile::kWindows];

    //   dy, argmax   the row, which is inside
    //   left         column of the tile
    //   at           not used for planes
    __device__ __forceinline__ WideRow(const T* dy, const unsigned char* argmax, int left,
                                       const PoolPlane<1, ChannelsLast>& plane,
                                       const WideColumns<Kernel, Whole>& at) {
        if constexpr (!ChannelsLast) {
            constexpr int kPad = Tile::kPad, kColumns = Tile::kColumns;
            PoolRow<unsigned char, Tile::kWindows, 1> bytes;
            gradients.template load<Whole, kPad, kColumns>(dy, left - kPad, plane.width, 1, true,
                                                           filled<T, 1>(from_accumulate<T>(0)));
            bytes.template load<Whole, kPad, kColumns>(argmax, left - kPad, plane.width, 1, true,
                                                       filled<unsigned char, 1>(0));
#pragma unroll
            for (int j = 0; j < Tile::kWindows; ++j) taps[j] = bytes.at[j][0];
        } else {
#pragma unroll
            for (int j = 0; j < Tile::kWindows; ++j) {
                const int place = at.columns[j] * plane.groups;
                gradients.at[j] = Vector<T, 1>::load(dy + place);
                taps[j] = argmax[place];
            }
        }
    }
};

// As max_pool_backward, of a strip of tiles.
//   dy, argmax   [images, height, width, channels] T, and of one byte; aligned to 16 bytes
//   dx           the same shape: every element is written once
//   strip        rows of inputs of a thread
//   tile, own    of the thread: its first tile, and its sums, each in an array of the block's
// Each row of windows is read once, from the last to the first, as are those of a row: what is added to an
// input comes in the order of the taps. A row of inputs is written once the windows that reach it have been
// seen. Sums of rows beside the strip, like those of columns beside the tile, are for nothing.
template <bool Whole, typename T, int Kernel, bool ChannelsLast>
__device__ __forceinline__ void scatter_wide(
    const T* dy, const unsigned char* argmax, T* dx, int strip, const PoolPlane<1, ChannelsLast>& plane,
    const PoolPosition<int>& tile, accumulate_t<T> (*own)[WideTile<Kernel, ChannelsLast>::kThreads]) {
    using A = accumulate_t<T>;
    using Tile = WideTile<Kernel, ChannelsLast>;
    constexpr int kColumns = Tile::kColumns, kPad = Tile::kPad, kRow = Tile::kRow;
    const long long before = plane.before(tile);
    const int left = tile.at[2] * kColumns;
    const int begin = tile.at[1] * strip, end = min(begin + strip, plane.height);
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) own[i][0] = A(0);
    const WideColumns<Kernel, Whole> columns(left, plane.width);
    // Rows that are further up. For channels last each thread asks for other columns, and those of a warp for
    // all of its channels.
    constexpr int kAskers = kSectorBytes / static_cast<int>(sizeof(T));
    constexpr int kAsked = ChannelsLast ? (Tile::kWindows + kAskers - 1) / kAskers : 1;
    const auto place_of = [&](int n) {
        return ChannelsLast ? min(max(left - kPad + n, 0), plane.width - 1) * plane.groups : left;
    };
    const int thread = static_cast<int>(threadIdx.x), place = place_of(thread % kAskers);
    const int asked = min(end - 1 + kPad, plane.height), rows_asked = asked - max(begin - kPad, 0);
    const long long first_asked = before + plane.row(0, asked - 1);
    const auto rows_of = [&](int bytes) {
        return ChannelsLast || asks_for_sector(left * bytes, kColumns * bytes) ? rows_asked : 0;
    };
    RowsAhead<T, kAsked> gradients_ahead(dy + first_asked + place, -plane.row(0, 1),
                                         place_of(thread % kAskers + kAskers) - place,
                                         rows_of(static_cast<int>(sizeof(T))));
    RowsAhead<unsigned char, 1> taps_ahead(argmax + first_asked + place_of(thread % (kAskers * kAsked)),
                                           -plane.row(0, 1), 0, rows_of(1));
    // Where the sums of the first row are that the windows of row h reach.
    int slot = 0;
#pragma unroll 1
    for (int h = end - 1 + kPad; h >= begin - kPad; --h) {
        const long long start = before + plane.row(0, min(max(h, 0), plane.height - 1));
        const WideRow<T, Kernel, ChannelsLast, Whole> windows(dy + start, argmax + start, left, plane,
                                                              columns);
        gradients_ahead.ask();
        taps_ahead.ask();
        if (h >= 0 && h < plane.height) {
#pragma unroll
            for (int j = Tile::kWindows - 1; j >= 0; --j) {
                const int tap = windows.taps[j], row = tap * ((2048 + Kernel - 1) / Kernel) >> 11;
                const unsigned int at =
                    slot + (ChannelsLast ? columns.sums[j] : j) + tap + row * (kRow - Kernel);
                // Beyond the last sum it is smaller without them all; where it is none it is the last, which
                // is beside the tile.
                const unsigned int within = min(min(at, at - Tile::kSums), Tile::kSums - 1u);
                own[within][0] += widened(windows.gradients.at[j], 0);
            }
        }
        // The last row that these windows reach is done, and its sums are for the row above the first one.
        const int done = h + kPad;
        slot = slot == 0 ? Tile::kSums - kRow : slot - kRow;
        PoolRow<T, kColumns, 1> result;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            A* const sum = own[slot + 2 * kPad + i];
            result.at[i][0] = from_accumulate<T>(*sum);
            *sum = A(0);
        }
        if (done >= end) continue;
        T* const target = dx + before + plane.row(0, done);
        if constexpr (!ChannelsLast) {
            result.template store<Whole>(target, left, plane.width, 1);
        } else {
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                if (Whole || left + i < plane.width) result.at[i].store(target + (left + i) * plane.groups);
            }
        }
    }
}

// Launch: 1-D, WideTile's kThreads, any number of blocks (grid-stride); units are strips of tiles of inputs.
template <typename T, int Kernel, bool ChannelsLast>
__global__ void __launch_bounds__((WideTile<Kernel, ChannelsLast>::kThreads), kWideBlocks)
    max_pool_backward_wide(const T* dy, const unsigned char* argmax, T* dx, int strip, PoolWindow window) {
    using Tile = WideTile<Kernel, ChannelsLast>;
    using Sums = accumulate_t<T>[Tile::kThreads];
    __shared__ Sums sums[Tile::kSums];
    Sums* const own = reinterpret_cast<Sums*>(&sums[0][threadIdx.x]);
    const PoolPlane<1, ChannelsLast> plane(window.input, window.groups);
    const long long total = pool_units(window);
    for (long long unit = static_cast<long long>(blockIdx.x) * Tile::kThreads + threadIdx.x; unit < total;
         unit += static_cast<long long>(gridDim.x) * Tile::kThreads) {
        const PoolPosition<int> tile = pool_position<int>(window, unit, 0);
        // The vectors of planes are aligned only where all tiles are whole.
        if (ChannelsLast ? (tile.at[2] + 1) * Tile::kColumns <= plane.width
                         : plane.width % Tile::kColumns == 0) {
            scatter_wide<true, T, Kernel, ChannelsLast>(dy, argmax, dx, strip, plane, tile, own);
        } else {
            scatter_wide<false, T, Kernel, ChannelsLast>(dy, argmax, dx, strip, plane, tile, own);
        }
    }
}
