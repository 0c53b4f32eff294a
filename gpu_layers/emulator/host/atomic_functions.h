// Atomics. One thread runs at a time, so plain code is atomic; the runtime is told of each one.
#ifndef GPU_LAYERS_EMULATOR_ATOMIC_FUNCTIONS_H_
#define GPU_LAYERS_EMULATOR_ATOMIC_FUNCTIONS_H_

#include <type_traits>

#include "device_runtime.h"

// Not traced as a plain load and store: that would look like a race.
#define GPU_LAYERS_ATOMIC __attribute__((noinline, no_sanitize("thread")))

namespace gpu_layers_emulator {

// A parameter of this type takes the type of the pointer, as CUDA's overloads do: atomicAdd(&float, 1).
template <typename T>
struct Same {
    using type = T;
};

template <typename T, typename Update>
__attribute__((always_inline, no_sanitize("thread"))) inline T update_atomically(T* address, Update update,
                                                                                 const void* return_address) {
    before_atomic(address, sizeof(T), return_address);
    const T old = *address;
    *address = update(old);
    return old;
}

}  // namespace gpu_layers_emulator

#define GPU_LAYERS_ATOMIC_FUNCTION(name, expression)                                                 \
    template <typename T>                                                                            \
    GPU_LAYERS_ATOMIC T name(T* address, typename gpu_layers_emulator::Same<T>::type value) {        \
        return gpu_layers_emulator::update_atomically(                                               \
            address, [&](T old) __attribute__((no_sanitize("thread"))) -> T { return expression; },  \
            __builtin_return_address(0));                                                            \
    }                                                                                                \
    template <typename T>                                                                            \
    __forceinline__ T name##_block(T* address, typename gpu_layers_emulator::Same<T>::type value) {  \
        return name(address, value);                                                                 \
    }                                                                                                \
    template <typename T>                                                                            \
    __forceinline__ T name##_system(T* address, typename gpu_layers_emulator::Same<T>::type value) { \
        return name(address, value);                                                                 \
    }

GPU_LAYERS_ATOMIC_FUNCTION(atomicAdd, static_cast<T>(old + value))
GPU_LAYERS_ATOMIC_FUNCTION(atomicSub, static_cast<T>(old - value))
GPU_LAYERS_ATOMIC_FUNCTION(atomicExch, ((void)old, value))
GPU_LAYERS_ATOMIC_FUNCTION(atomicMin, value < old ? value : old)
GPU_LAYERS_ATOMIC_FUNCTION(atomicMax, old < value ? value : old)
GPU_LAYERS_ATOMIC_FUNCTION(atomicAnd, static_cast<T>(old& value))
GPU_LAYERS_ATOMIC_FUNCTION(atomicOr, static_cast<T>(old | value))
GPU_LAYERS_ATOMIC_FUNCTION(atomicXor, static_cast<T>(old ^ value))
GPU_LAYERS_ATOMIC_FUNCTION(atomicInc, old >= value ? T(0) : static_cast<T>(old + 1))
GPU_LAYERS_ATOMIC_FUNCTION(atomicDec, (old == T(0) || old > value) ? value : static_cast<T>(old - 1))
#undef GPU_LAYERS_ATOMIC_FUNCTION

template <typename T>
GPU_LAYERS_ATOMIC T atomicCAS(T* address, typename gpu_layers_emulator::Same<T>::type expected,
                              typename gpu_layers_emulator::Same<T>::type desired) {
    static_assert(std::is_integral<T>::value, "CUDA compares and swaps integers");
    return gpu_layers_emulator::update_atomically(
        address,
        [&](T old) __attribute__((no_sanitize("thread"))) -> T { return old == expected ? desired : old; },
        __builtin_return_address(0));
}

#undef GPU_LAYERS_ATOMIC

#endif  // GPU_LAYERS_EMULATOR_ATOMIC_FUNCTIONS_H_
