// Stands in for crt/host_defines.h, which some CUDA wheels leave out.
// The CUDA headers and the kernels need these words to mean "ordinary C++".
#ifndef GPU_LAYERS_EMULATOR_CUDA_HOST_DEFINES_H_
#define GPU_LAYERS_EMULATOR_CUDA_HOST_DEFINES_H_

#define __HOST_DEFINES_H__  // the guard of the real header, should anything reach it

#define __host__
#define __device__
#define __global__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)

// One segment of the module holds every static shared array: the runtime can find it, poison it for
// each block and swap it between the blocks of a cooperative launch.
#define __shared__ thread_local

#define __forceinline__ inline __attribute__((always_inline))
#define __inline_hint__ inline
#define __no_return__ __attribute__((noreturn))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define __annotate__(...)
#define __location__(...)
#define __specialization_static
#define __thread__ __thread
#define __nv_pure__
#define __import__
#define __export__
#ifndef __cdecl
#define __cdecl
#endif
#define CUDARTAPI
#define CUDARTAPI_CDECL

#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__

#define __CUDA_ARCH_HAS_FEATURE__(feature) 0
#define __CUDA_HAS_ARCH_FAMILY_SPECIFIC(n) 0
#define __CUDA_HAS_ARCH_SPECIFIC(n) 0
#ifndef __NV_TL__
#define __NV_TL__
#endif
#ifndef __NV_TL_BUILTIN__
#define __NV_TL_BUILTIN__
#endif

#endif  // GPU_LAYERS_EMULATOR_CUDA_HOST_DEFINES_H_
