// Access patterns whose traffic can be counted by hand.

// Coalesced: 16 bytes a thread.   x, y: 4 * threads floats
__global__ void copy_vectors(const float* x, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n / 4) {
        reinterpret_cast<float4*>(y)[i] = reinterpret_cast<const float4*>(x)[i];  // BUG: copy_vectors
    }
}

// One element of every `stride`.
__global__ void copy_strided(const float* x, float* y, int stride) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i * stride];
}

// A loop: the same instruction makes one request for each turn.
__global__ void copy_in_a_loop(const float* x, float* y, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) y[i] = x[i];
}

// Lane t touches word t * stride of shared memory.
template <typename T>
__global__ void shared_stride(T* out, int stride) {
    __shared__ __align__(16) T tile[1024];
    const T zero = T();
    tile[threadIdx.x * stride] = zero;
    __syncwarp();
    out[threadIdx.x] = tile[threadIdx.x * stride];
}

// Everybody reads one word: a broadcast, no conflict.
__global__ void shared_broadcast(float* out) {
    __shared__ float tile[32];
    tile[threadIdx.x] = 1.0f;
    __syncwarp();
    out[threadIdx.x] = tile[5];
}

__global__ void count_atomically(int* counters) { atomicAdd(&counters[threadIdx.x % 2], 1); }

// Both arguments may be the same array.
__global__ void scale_in_place(const float* x, float* y, float factor) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i] * factor;
}

// Reads what it also writes.
__global__ void accumulate(const float* x, float* y) { y[threadIdx.x] += x[threadIdx.x]; }

__device__ __forceinline__ float load_through(const float* x, int i) {
    return x[i];  // BUG: load_through inner
}
__global__ void inlined(const float* x, float* y) {
    y[threadIdx.x] = load_through(x, threadIdx.x);  // BUG: load_through outer
}

struct Pair {
    float first;
    float second;
};
struct alignas(16) Wide {
    float values[8];
};
// Structs of 8 bytes aligned to 4, and of 32 bytes aligned to 16.
__global__ void copy_structs(const Pair* x, Pair* y, const Wide* u, Wide* v) {
    y[threadIdx.x] = x[threadIdx.x];
    v[threadIdx.x] = u[threadIdx.x];
}
