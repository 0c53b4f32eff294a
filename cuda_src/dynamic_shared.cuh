// The shared memory that a launch gives a block, as slots of 16 bytes.
//   DYNAMIC_SHARED(slots);
//   SharedCache<T, Width> cache(slots);
#pragma once

#ifdef GPU_LAYERS_EMULATED
#define DYNAMIC_SHARED(name)                 \
    GPU_LAYERS_DYNAMIC_SHARED(name##_bytes); \
    uint4* const name = reinterpret_cast<uint4*>(name##_bytes)
#else
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif
