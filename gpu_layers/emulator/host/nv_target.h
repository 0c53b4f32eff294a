// Stands in for nv/target, which ships apart from the CUDA runtime headers.
// The half-precision headers choose between device and host code with it; here every choice is "host".
#ifndef GPU_LAYERS_EMULATOR_NV_TARGET_H_
#define GPU_LAYERS_EMULATOR_NV_TARGET_H_

// A branch may or may not stand in parentheses: UNWRAP drops them where they are. With them, MARK is
// called and leaves "GPU_LAYERS_NV_MARK branch"; without, it is left uncalled, which reads the same.
#define GPU_LAYERS_NV_MARK(...) GPU_LAYERS_NV_MARK __VA_ARGS__
#define GPU_LAYERS_NV_DROP_GPU_LAYERS_NV_MARK
#define GPU_LAYERS_NV_DROP_(...) GPU_LAYERS_NV_DROP_##__VA_ARGS__
#define GPU_LAYERS_NV_DROP(...) GPU_LAYERS_NV_DROP_(__VA_ARGS__)
#define GPU_LAYERS_NV_UNWRAP(...) GPU_LAYERS_NV_DROP(GPU_LAYERS_NV_MARK __VA_ARGS__)
#define GPU_LAYERS_NV_JOIN_(a, b) a##b
#define GPU_LAYERS_NV_JOIN(a, b) GPU_LAYERS_NV_JOIN_(a, b)

#define NV_IS_HOST 1
#define NV_ANY_TARGET 1
#define NV_IS_DEVICE 0
#define NV_NO_TARGET 0
#define NV_PROVIDES_SM_53 0
#define NV_PROVIDES_SM_60 0
#define NV_PROVIDES_SM_61 0
#define NV_PROVIDES_SM_62 0
#define NV_PROVIDES_SM_70 0
#define NV_PROVIDES_SM_72 0
#define NV_PROVIDES_SM_75 0
#define NV_PROVIDES_SM_80 0
#define NV_PROVIDES_SM_86 0
#define NV_PROVIDES_SM_87 0
#define NV_PROVIDES_SM_89 0
#define NV_PROVIDES_SM_90 0
#define NV_PROVIDES_SM_100 0

#define GPU_LAYERS_NV_CHOOSE_0(yes, no) {GPU_LAYERS_NV_UNWRAP(no)}
#define GPU_LAYERS_NV_CHOOSE_1(yes, no) {GPU_LAYERS_NV_UNWRAP(yes)}

#define NV_IF_ELSE_TARGET(condition, yes, no) GPU_LAYERS_NV_JOIN(GPU_LAYERS_NV_CHOOSE_, condition)(yes, no)
#define NV_IF_TARGET(condition, ...) GPU_LAYERS_NV_JOIN(GPU_LAYERS_NV_CHOOSE_, condition)(__VA_ARGS__, ())

#endif  // GPU_LAYERS_EMULATOR_NV_TARGET_H_
