// Kernels for the sanitizers' tests: fibres that switch a lot, and bugs that only a sanitizer of the host
// sees.

// Sums each block's floats in shared memory, with warp shuffles and a local array: many switches.
__global__ void block_sum(const float* x, float* y) {
    __shared__ float partial[32];
    float scratch[8];
    for (int i = 0; i < 8; ++i)
        scratch[i] = x[blockIdx.x * blockDim.x + threadIdx.x] * (i == threadIdx.x % 8);
    float sum = 0.0f;
    for (int i = 0; i < 8; ++i) sum += scratch[i];
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += partial[w];
        y[blockIdx.x] = sum;
    }
}

__global__ void read_past_the_end(const float* x, float* y, int n) { y[threadIdx.x] = x[threadIdx.x + n]; }

__global__ void write_before_the_start(float* y) { y[static_cast<int>(threadIdx.x) - 1] = 1.0f; }

__global__ void dynamic_shared_overrun(float* y, int n) {
    GPU_LAYERS_DYNAMIC_SHARED(raw);
    raw[n] = 1;
    y[0] = raw[0];
}

// A local array that is too short: no race detector, and no bounds check of arguments, sees it.
__global__ void local_overrun(const int* x, int* y) {
    int counts[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; ++i) counts[x[i]] += 1;
    y[0] = counts[0];
}

__global__ void signed_overflow(const int* x, int* y) { y[0] = x[0] * x[1]; }
__global__ void wide_shift(const int* x, int* y) { y[0] = 1 << x[0]; }

// An argument by value, in which nobody counts accesses; its last array might as well be the beginning of a
// longer one.
struct Table {
    int count;
    int values[4];
};
__global__ void overrun_in_a_struct(Table table, const int* x, int* y) { y[0] = table.values[x[0]]; }
