// Shuffles, votes and reductions between the lanes of a warp.
#ifndef GPU_LAYERS_EMULATOR_WARP_FUNCTIONS_H_
#define GPU_LAYERS_EMULATOR_WARP_FUNCTIONS_H_

#include <cstring>
#include <type_traits>

#include "device_runtime.h"

namespace gpu_layers_emulator {

template <typename T>
inline T shuffle(WarpOperation operation, unsigned mask, T value, unsigned operand, int width,
                 SourceLine where) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = warp_collective(operation, mask, bits, operand, width, where);
    memcpy(static_cast<void*>(&value), &bits, sizeof(T));
    return value;
}

template <typename T>
inline T reduce(WarpOperation operation, unsigned mask, T value, SourceLine where) {
    return static_cast<T>(warp_collective(operation, mask, static_cast<uint32_t>(value), 0, 32, where));
}

}  // namespace gpu_layers_emulator

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source_lane, int width = 32, GPU_LAYERS_HERE) {
    using gpu_layers_emulator::WarpOperation;
    return gpu_layers_emulator::shuffle(WarpOperation::kShuffle, mask, value, source_lane, width,
                                        {file, line});
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, GPU_LAYERS_HERE) {
    using gpu_layers_emulator::WarpOperation;
    return gpu_layers_emulator::shuffle(WarpOperation::kShuffleUp, mask, value, delta, width, {file, line});
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, GPU_LAYERS_HERE) {
    using gpu_layers_emulator::WarpOperation;
    return gpu_layers_emulator::shuffle(WarpOperation::kShuffleDown, mask, value, delta, width, {file, line});
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, GPU_LAYERS_HERE) {
    using gpu_layers_emulator::WarpOperation;
    return gpu_layers_emulator::shuffle(WarpOperation::kShuffleXor, mask, value, lane_mask, width,
                                        {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, GPU_LAYERS_HERE) {
    using gpu_layers_emulator::WarpOperation;
    return static_cast<unsigned>(gpu_layers_emulator::warp_collective(WarpOperation::kBallot, mask,
                                                                      predicate != 0, 0, 32, {file, line}));
}
inline int __all_sync(unsigned mask, int predicate, GPU_LAYERS_HERE) {
    using gpu_layers_emulator::WarpOperation;
    return static_cast<int>(
        gpu_layers_emulator::warp_collective(WarpOperation::kAll, mask, predicate != 0, 0, 32, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, GPU_LAYERS_HERE) {
    using gpu_layers_emulator::WarpOperation;
    return static_cast<int>(
        gpu_layers_emulator::warp_collective(WarpOperation::kAny, mask, predicate != 0, 0, 32, {file, line}));
}
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value, GPU_LAYERS_HERE) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "a match compares at most 8 bytes");
    using gpu_layers_emulator::WarpOperation;
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return static_cast<unsigned>(
        gpu_layers_emulator::warp_collective(WarpOperation::kMatchAny, mask, bits, 0, 32, {file, line}));
}

#define GPU_LAYERS_WARP_REDUCTION(function, type, operation)                                           \
    inline type function(unsigned mask, type value, GPU_LAYERS_HERE) {                                 \
        return gpu_layers_emulator::reduce(gpu_layers_emulator::WarpOperation::operation, mask, value, \
                                           {file, line});                                              \
    }
GPU_LAYERS_WARP_REDUCTION(__reduce_add_sync, int, kReduceAdd)
GPU_LAYERS_WARP_REDUCTION(__reduce_add_sync, unsigned, kReduceAdd)
GPU_LAYERS_WARP_REDUCTION(__reduce_and_sync, unsigned, kReduceAnd)
GPU_LAYERS_WARP_REDUCTION(__reduce_or_sync, unsigned, kReduceOr)
GPU_LAYERS_WARP_REDUCTION(__reduce_xor_sync, unsigned, kReduceXor)
GPU_LAYERS_WARP_REDUCTION(__reduce_min_sync, int, kReduceMinSigned)
GPU_LAYERS_WARP_REDUCTION(__reduce_max_sync, int, kReduceMaxSigned)
GPU_LAYERS_WARP_REDUCTION(__reduce_min_sync, unsigned, kReduceMinUnsigned)
GPU_LAYERS_WARP_REDUCTION(__reduce_max_sync, unsigned, kReduceMaxUnsigned)
#undef GPU_LAYERS_WARP_REDUCTION

#endif  // GPU_LAYERS_EMULATOR_WARP_FUNCTIONS_H_
