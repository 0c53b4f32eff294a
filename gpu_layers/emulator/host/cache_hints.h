// Loads and stores with a cache hint: plain ones here, and traced like them.
#ifndef GPU_LAYERS_EMULATOR_CACHE_HINTS_H_
#define GPU_LAYERS_EMULATOR_CACHE_HINTS_H_

#define GPU_LAYERS_LOAD(name)                  \
    template <typename T>                      \
    __forceinline__ T name(const T* address) { \
        return *address;                       \
    }
GPU_LAYERS_LOAD(__ldg)
GPU_LAYERS_LOAD(__ldca)
GPU_LAYERS_LOAD(__ldcg)
GPU_LAYERS_LOAD(__ldcs)
GPU_LAYERS_LOAD(__ldlu)
GPU_LAYERS_LOAD(__ldcv)
#undef GPU_LAYERS_LOAD

#define GPU_LAYERS_STORE(name)                              \
    template <typename T, typename U>                       \
    __forceinline__ void name(T* address, const U& value) { \
        *address = value;                                   \
    }
GPU_LAYERS_STORE(__stwb)
GPU_LAYERS_STORE(__stcg)
GPU_LAYERS_STORE(__stcs)
GPU_LAYERS_STORE(__stwt)
#undef GPU_LAYERS_STORE

#endif  // GPU_LAYERS_EMULATOR_CACHE_HINTS_H_
