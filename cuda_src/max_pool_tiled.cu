// Max pooling with common windows: the kernels of max_pool.cu, by tiles (the picture is in pool_tile.cuh).
//
// Forward, a row of taps has its largest first, and windows that overlap share it (max_pool_tile.cuh).
// Backward, a tile of inputs looks at the windows over it (window_gradients.cuh).
#include "max_pool_tile.cuh"
#include "window_gradients.cuh"

// Blocks that must fit on a multiprocessor at once: threads keep the largest of a row for each row of a
// window. With four, what Blackwell's code for deep windows needs would be spilled.
template <int Kernel, bool ChannelsLast, bool Deep>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kForwardBlocks = Kernel > 3 ? 2 : 4;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1000
constexpr int kForwardBlocks = Kernel > 3 ? (ChannelsLast ? 2 : 3) : 4;
#else
constexpr int kForwardBlocks = Kernel > 3 ? 2 : (Deep && !ChannelsLast && Kernel > 2 ? 3 : 4);
#endif

// Launch: as forward_strips.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads, (kForwardBlocks<Kernel, ChannelsLast, Deep>))
    max_pool_forward_tiled(const T* x, T* y, unsigned char* argmax, int strip, PoolWindow window) {
    by_whole_tiles<PoolTile<T, Kernel, Stride, Pad, ChannelsLast>>(window, [&](auto whole) {
        forward_strips<decltype(whole)::value, T, Kernel, Stride, Pad, ChannelsLast, Deep>(x, y, argmax,
                                                                                           strip, window);
    });
}

// Likewise, backward: from windows side by side nothing is kept for the next row.
template <typename Tile>
constexpr int kBackwardBlocks = Tile::kOverlap ? Tile::kGatherBlocks : 4;

// As max_pool_backward.
//   dy, argmax, dx   as there; one byte a tap
//   strip            of a thread: so many times Stride rows of inputs
//   Deep             an input may be in several windows along depth; of windows side by side it is in one
// Launch: as gather_strips.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads,
                                  (kBackwardBlocks<PoolTile<T, Kernel, Stride, Pad, ChannelsLast>>))
    max_pool_backward_tiled(const T* dy, const unsigned char* argmax, T* dx, int strip, PoolWindow window) {
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    by_whole_tiles<Tile>(window, [&](auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        gather_strips<kWhole, T, Tile, Deep && Tile::kOverlap>(
            dy, argmax, strip, window, [&](const PoolPosition<int>& tile, const auto& input, int, int) {
                return StoredRows<kWhole, Tile, T>{dx + input.before(tile) + input.row(tile.at[0], 0),
                                                   tile.at[2] * Tile::kBody, input.row(0, 1), input.width,
                                                   input.groups};
            });
    });
}
