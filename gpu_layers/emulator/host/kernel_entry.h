// Turns a kernel's name expression into something Python can describe and start.
#ifndef GPU_LAYERS_EMULATOR_KERNEL_ENTRY_H_
#define GPU_LAYERS_EMULATOR_KERNEL_ENTRY_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#include <utility>

#include "launch_abi.h"

namespace gpu_layers_emulator {

extern const KernelRecord* first_kernel;

template <typename T>
constexpr const char* pretty_function() {
    return __PRETTY_FUNCTION__;
}

template <typename T>
constexpr int32_t kind_of() {
    using V = std::remove_cv_t<T>;
    if (std::is_void<V>::value) return kKindVoid;
    if (std::is_same<V, bool>::value) return kKindBool;
    if (std::is_same<V, __half>::value) return kKindHalf;
    if (std::is_same<V, __nv_bfloat16>::value) return kKindBfloat16;
    if (std::is_floating_point<V>::value) return kKindFloat;
    if (std::is_integral<V>::value) return std::is_signed<V>::value ? kKindSigned : kKindUnsigned;
    if constexpr (std::is_enum<V>::value) return kind_of<std::underlying_type_t<V>>();
    return kKindOther;
}

template <typename T>
struct SizeOf {
    static constexpr uint64_t value = sizeof(T);
};
template <>
struct SizeOf<void> {
    static constexpr uint64_t value = 1;
};

template <typename P>
constexpr ParameterRecord describe() {
    using Value = std::remove_pointer_t<P>;
    static_assert(std::is_trivially_copyable<P>::value || std::is_same<P, __half>::value ||
                      std::is_same<P, __nv_bfloat16>::value,
                  "a kernel parameter is copied as bytes");
    return {pretty_function<P>(), SizeOf<std::remove_cv_t<Value>>::value, kind_of<Value>(),
            std::is_pointer<P>::value, std::is_const<Value>::value};
}

template <typename F>
struct Signature;
template <typename... P>
struct Signature<void (*)(P...)> {
    static constexpr int count = sizeof...(P);
    static constexpr ParameterRecord records[sizeof...(P) + 1] = {describe<P>()..., {}};
    // Reading the packed arguments is the launch's doing, not the kernel's: it is never traced.
    template <void (*kernel)(P...), std::size_t... i>
    __attribute__((no_sanitize("thread"))) static void call(void** values, std::index_sequence<i...>) {
        (void)values;
        kernel(*static_cast<std::remove_cv_t<P>*>(values[i])...);
    }
    template <void (*kernel)(P...)>
    __attribute__((no_sanitize("thread"))) static void invoke(void** values) {
        call<kernel>(values, std::index_sequence_for<P...>());
    }
};

struct KernelRegistration {
    KernelRecord record;
    KernelRegistration(int32_t index, int32_t count, const ParameterRecord* parameters,
                       void (*invoke)(void**))
        : record{index, count, parameters, invoke, first_kernel} {
        first_kernel = &record;
    }
};

template <typename... P>
Signature<void (*)(P...)> signature_of(void (*)(P...));

}  // namespace gpu_layers_emulator

// `...` is the name expression, commas and all.
#define GPU_LAYERS_EMULATED_KERNEL(index, ...)                                     \
    static ::gpu_layers_emulator::KernelRegistration gpu_layers_kernel_##index(    \
        index, decltype(::gpu_layers_emulator::signature_of(&__VA_ARGS__))::count, \
        decltype(::gpu_layers_emulator::signature_of(&__VA_ARGS__))::records,      \
        &decltype(::gpu_layers_emulator::signature_of(&__VA_ARGS__))::template invoke<&__VA_ARGS__>);

#endif  // GPU_LAYERS_EMULATOR_KERNEL_ENTRY_H_
