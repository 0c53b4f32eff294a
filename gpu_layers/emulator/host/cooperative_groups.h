// The part of cooperative groups that these kernels may use: grid, block and tiles of a warp.
#ifndef GPU_LAYERS_EMULATOR_COOPERATIVE_GROUPS_H_
#define GPU_LAYERS_EMULATOR_COOPERATIVE_GROUPS_H_

#include "builtin_variables.h"
#include "synchronization.h"
#include "warp_functions.h"

namespace cooperative_groups {

class thread_block {
  public:
    void sync(GPU_LAYERS_HERE) const { __syncthreads(file, line); }
    unsigned thread_rank() const {
        return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    }
    unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
    unsigned size() const { return num_threads(); }
    dim3 group_index() const { return dim3(blockIdx.x, blockIdx.y, blockIdx.z); }
    dim3 thread_index() const { return dim3(threadIdx.x, threadIdx.y, threadIdx.z); }
    dim3 dim_threads() const { return blockDim; }
};
inline thread_block this_thread_block() { return {}; }

class grid_group {
  public:
    bool is_valid() const { return gpu_layers_emulator::is_cooperative_launch(); }
    void sync(GPU_LAYERS_HERE) const { gpu_layers_emulator::grid_barrier({file, line}); }
    unsigned long long block_rank() const {
        return blockIdx.x + static_cast<unsigned long long>(gridDim.x) *
                                (blockIdx.y + static_cast<unsigned long long>(gridDim.y) * blockIdx.z);
    }
    unsigned long long num_blocks() const {
        return static_cast<unsigned long long>(gridDim.x) * gridDim.y * gridDim.z;
    }
    unsigned long long thread_rank() const {
        return block_rank() * this_thread_block().num_threads() + this_thread_block().thread_rank();
    }
    unsigned long long num_threads() const { return num_blocks() * this_thread_block().num_threads(); }
    unsigned long long size() const { return num_threads(); }
    dim3 group_dim() const { return gridDim; }
    dim3 dim_blocks() const { return gridDim; }
    dim3 block_index() const { return dim3(blockIdx.x, blockIdx.y, blockIdx.z); }
};
inline grid_group this_grid() { return {}; }

template <unsigned Size>
class thread_block_tile {
    static_assert(Size >= 1 && Size <= 32 && (Size & (Size - 1)) == 0,
                  "a tile is a power of two up to a warp");

  public:
    unsigned thread_rank() const { return this_thread_block().thread_rank() % Size; }
    unsigned meta_group_rank() const { return this_thread_block().thread_rank() / Size; }
    unsigned meta_group_size() const { return (this_thread_block().num_threads() + Size - 1) / Size; }
    static constexpr unsigned num_threads() { return Size; }
    static constexpr unsigned size() { return Size; }

    void sync(GPU_LAYERS_HERE) const { __syncwarp(mask(), file, line); }
    template <typename T>
    T shfl(T value, int source, GPU_LAYERS_HERE) const {
        return __shfl_sync(mask(), value, source, Size, file, line);
    }
    template <typename T>
    T shfl_up(T value, unsigned delta, GPU_LAYERS_HERE) const {
        return __shfl_up_sync(mask(), value, delta, Size, file, line);
    }
    template <typename T>
    T shfl_down(T value, unsigned delta, GPU_LAYERS_HERE) const {
        return __shfl_down_sync(mask(), value, delta, Size, file, line);
    }
    template <typename T>
    T shfl_xor(T value, unsigned lane_mask, GPU_LAYERS_HERE) const {
        return __shfl_xor_sync(mask(), value, static_cast<int>(lane_mask), Size, file, line);
    }
    unsigned ballot(int predicate, GPU_LAYERS_HERE) const {
        return __ballot_sync(mask(), predicate, file, line) >> first_lane();
    }
    int any(int predicate, GPU_LAYERS_HERE) const { return __any_sync(mask(), predicate, file, line); }
    int all(int predicate, GPU_LAYERS_HERE) const { return __all_sync(mask(), predicate, file, line); }

  private:
    static unsigned first_lane() { return this_thread_block().thread_rank() % 32 / Size * Size; }
    static unsigned mask() { return (Size == 32 ? 0xffffffffu : (1u << Size % 32) - 1u) << first_lane(); }
};
template <unsigned Size>
thread_block_tile<Size> tiled_partition(const thread_block&) {
    return {};
}

template <typename Group>
void sync(const Group& group, GPU_LAYERS_HERE) {
    group.sync(file, line);
}

}  // namespace cooperative_groups

#endif  // GPU_LAYERS_EMULATOR_COOPERATIVE_GROUPS_H_
