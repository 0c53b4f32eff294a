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
    static constexpr int kWidth = 1, kColumns = 8;
    static constexpr int kPad = Kernel / 2, kWindows = kColumns + Kernel - 1;
    // Sums of a thread: of the rows that a row of windows reaches.
    static constexpr int kRow = kColumns * kWidth, kSums = Kernel * kRow;
    static constexpr int kThreads = 128;
};

// Blocks that must fit on a multiprocessor at once: 20 KB are shared in each.
constexpr int kWideBlocks = 6;

// As max_pool_backward.
//   dy, argmax   [images, height, width, channels] T, and of one byte; aligned to 16 bytes
//   dx           the same shape: every element is written once
//   strip        rows of inputs of a thread
// Each row of windows is read once, from the last to the first, as are those of a row: what is added to an
// input comes in the order of the taps. A row of inputs is written once the windows that reach it have been
// seen.
template <bool Whole, typename T, int Kernel, bool ChannelsLast>
__device__ __forceinline__ void scatter_wide(const T* dy, const unsigned char* argmax, T* dx, int strip,
                                             const PoolWindow& window, accumulate_t<T>* sums) {
    using A = accumulate_t<T>;
    using Tile = WideTile<Kernel, ChannelsLast>;
    constexpr int kWidth = Tile::kWidth, kColumns = Tile::kColumns, kPad = Tile::kPad, kRow = Tile::kRow;
    constexpr int kThreads = Tile::kThreads;
    using Plane = PoolPlane<kWidth, ChannelsLast>;
    const Plane plane(window.input, window.groups);
    const Vector<T, kWidth> nothing = filled<T, kWidth>(from_accumulate<T>(0));
    const Vector<unsigned char, kWidth> no_tap = filled<unsigned char, kWidth>(0);
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
        struct Windows {
            PoolRow<T, Tile::kWindows, kWidth> gradients;
            PoolRow<unsigned char, Tile::kWindows, kWidth> taps;
        };
        const auto load = [&](int h) {
            const long long start = before + plane.row(0, h);
            const bool inside = h >= 0 && h < plane.height;
            Windows row;
            row.gradients.template load<Whole, kPad, kColumns>(dy + start, left - kPad, plane.width,
                                                               plane.groups, inside, nothing);
            row.taps.template load<Whole, kPad, kColumns>(argmax + start, left - kPad, plane.width,
                                                          plane.groups, inside, no_tap);
            return row;
        };
        // Where the sums of the first row are that the windows of row h reach.
        int slot = 0;
        Windows next = load(end - 1 + kPad);
#pragma unroll 1
        for (int h = end - 1 + kPad; h >= begin - kPad; --h) {
            // The row above is on its way while this one is looked at.
            const Windows row_of_windows = next;
            next = load(h - 1);
            // Of the rows of taps those that are in the strip.
            const int first_row = max(begin + kPad - h, 0);
            const unsigned int rows = min(end + kPad - h, Kernel) - first_row;
#pragma unroll
            for (int j = Tile::kWindows - 1; j >= 0; --j) {
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    const int tap = row_of_windows.taps.at[j][k],
                              row = tap * ((2048 + Kernel - 1) / Kernel) >> 11;
                    const int column = tap - row * Kernel + (j - 2 * kPad);
                    // In the middle every tap is of the tile's columns.
                    if ((j < 2 * kPad && column < 0) || (j >= kColumns && column >= kColumns)) continue;
                    if (static_cast<unsigned int>(row - first_row) >= rows) continue;
                    int at = slot + row * kRow;
                    if (at >= Tile::kSums) at -= Tile::kSums;
                    at += column * kWidth + k;
                    own[at * kThreads] += widened(row_of_windows.gradients.at[j], k);
                }
            }
            // The last row that these windows reach is done, and its sums are for the row above the first
            // one.
            const int done = h + kPad;
            slot = slot == 0 ? Tile::kSums - kRow : slot - kRow;
            if (done < end) {
                PoolRow<T, kColumns, kWidth> result;
#pragma unroll
                for (int i = 0; i < kRow; ++i) {
                    result.at[i / kWidth][i % kWidth] = from_accumulate<T>(own[(slot + i) * kThreads]);
                    own[(slot + i) * kThreads] = A(0);
                }
                result.template store<Whole>(dx + before + plane.row(0, done), left, plane.width,
                                             plane.groups);
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
