// One kernel for each thing that device code may use; the tests know the values.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// --- Built-in variables and launches --------------------------------------------------------------------

// Ten numbers for each thread of a 3-D launch.
__global__ void __launch_bounds__(64, 2) built_in_variables(unsigned* out) {
    const unsigned long long block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    unsigned* mine = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 10;
    mine[0] = threadIdx.x, mine[1] = threadIdx.y, mine[2] = threadIdx.z;
    mine[3] = blockIdx.x, mine[4] = blockIdx.y, mine[5] = blockIdx.z;
    mine[6] = blockDim.x + 100 * blockDim.y + 10000 * blockDim.z;
    mine[7] = gridDim.x + 100 * gridDim.y + 10000 * gridDim.z;
    mine[8] = warpSize;
    mine[9] = thread;
}

struct Window {
    int size[3];
    float scale;
    long long stride;
};
__global__ void struct_by_value(Window window, double* out) {
    out[0] = window.size[0], out[1] = window.size[1], out[2] = window.size[2];
    out[3] = window.scale, out[4] = static_cast<double>(window.stride);
}

// Every template argument a name expression may have.
template <typename T, int kWidth, bool kNegate, typename Index>
__global__ void name_expression(const T* x, T* y, Index n) {
    for (Index i = threadIdx.x * kWidth; i < n; i += static_cast<Index>(blockDim.x) * kWidth) {
        for (int k = 0; k < kWidth && i + k < n; ++k) y[i + k] = kNegate ? -x[i + k] : x[i + k];
    }
}
template <typename T>
struct Twice {
    __device__ static T apply(T x) { return x + x; }
};
template <typename Op, typename T>
__global__ void nested_template(const T* x, T* y) {
    y[threadIdx.x] = Op::apply(x[threadIdx.x]);
}
extern "C" __global__ void plain_c_name(int* out) { out[threadIdx.x] = static_cast<int>(threadIdx.x); }

__constant__ float kTable[4] = {1.0f, 2.0f, 4.0f, 8.0f};
__device__ int call_count = 0;
__global__ void module_variables(float* out, int* calls) {
    out[threadIdx.x] = kTable[threadIdx.x % 4];
    if (threadIdx.x == 0) *calls = ++call_count;
}

// --- Barriers and shared memory ---------------------------------------------------------------------------

__global__ void block_votes(const int* x, int* out) {
    const int count = __syncthreads_count(x[threadIdx.x] > 2);
    const int all = __syncthreads_and(x[threadIdx.x] > -1);
    const int any = __syncthreads_or(x[threadIdx.x] == 1000);
    if (threadIdx.x == 0) out[0] = count, out[1] = all, out[2] = any;
}

// Sums of three batches of copies, of 4, 8 and 16 bytes, each taken when it is there.   Launch: 1 block of 32
__global__ void async_copies(const int* x, int* y) {
    __shared__ int4 quads[32];
    __shared__ int2 pairs[32];
    __shared__ int singles[32];
    const unsigned t = threadIdx.x;
    __pipeline_memcpy_async(singles + t, x + t, 4);
    __pipeline_commit();
    __pipeline_memcpy_async(pairs + t, x + 2 * t, 8);
    __pipeline_commit();
    __pipeline_memcpy_async(quads + t, x + 4 * t, 16);
    __pipeline_commit();
    __pipeline_wait_prior(2);
    int sum = singles[t];
    __pipeline_wait_prior(1);
    sum += pairs[t].y;
    // The first may take the next one's place, while the last is on its way.
    __pipeline_memcpy_async(singles + t, x + 64 + t, 4);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    y[t] = sum + quads[t].w + singles[t];
}

// Exclusive prefix sum in shared memory: many barriers.
__global__ void scan(const int* x, int* y) {
    GPU_LAYERS_DYNAMIC_SHARED(raw);
    int* sums = reinterpret_cast<int*>(raw);
    const unsigned t = threadIdx.x;
    sums[t] = x[t];
    __syncthreads();
    for (unsigned step = 1; step < blockDim.x; step *= 2) {
        const int left = t >= step ? sums[t - step] : 0;
        __syncthreads();
        sums[t] += left;
        __syncthreads();
    }
    y[t] = t > 0 ? sums[t - 1] : 0;
}

// What shared memory holds before anybody writes it: NaN.
__global__ void poison(int* is_nan) {
    GPU_LAYERS_DYNAMIC_SHARED(raw);
    __shared__ float fixed[4];
    const float mine = reinterpret_cast<float*>(raw)[threadIdx.x];
    is_nan[threadIdx.x] = (mine != mine) + 2 * (fixed[threadIdx.x] != fixed[threadIdx.x]);
    reinterpret_cast<float*>(raw)[threadIdx.x] = 0.0f;
    fixed[threadIdx.x] = 0.0f;
}

__global__ void last_byte_of_shared(int* out, int bytes) {
    GPU_LAYERS_DYNAMIC_SHARED(raw);
    raw[bytes - 1] = 7;
    out[0] = raw[bytes - 1] + (reinterpret_cast<unsigned long long>(raw) % 16 == 0 ? 0 : 100);
}

// --- Warps ------------------------------------------------------------------------------------------------

template <typename T>
__global__ void shuffles(const T* x, T* out) {
    const unsigned lane = threadIdx.x;
    const T value = x[lane];
    out[lane] = __shfl_sync(0xffffffffu, value, 5);
    out[32 + lane] = __shfl_sync(0xffffffffu, value, 3, 8);
    out[64 + lane] = __shfl_up_sync(0xffffffffu, value, 2);
    out[96 + lane] = __shfl_up_sync(0xffffffffu, value, 2, 8);
    out[128 + lane] = __shfl_down_sync(0xffffffffu, value, 3);
    out[160 + lane] = __shfl_down_sync(0xffffffffu, value, 3, 16);
    out[192 + lane] = __shfl_xor_sync(0xffffffffu, value, 9);
    out[224 + lane] = __shfl_xor_sync(0xffffffffu, value, 1, 2);
}

__global__ void votes(const int* x, unsigned* out) {
    const unsigned lane = threadIdx.x;
    const unsigned mask = lane < 8 ? 0x000000ffu : 0xffffff00u;
    out[lane] = __ballot_sync(mask, x[lane] % 3 == 0);
    out[32 + lane] = __any_sync(mask, x[lane] == 4);
    out[64 + lane] = __all_sync(mask, x[lane] < 8);
    out[96 + lane] = __match_any_sync(0xffffffffu, x[lane] / 4);
    out[128 + lane] = __reduce_add_sync(0xffffffffu, static_cast<unsigned>(x[lane]));
    out[160 + lane] = static_cast<unsigned>(__reduce_min_sync(0xffffffffu, x[lane] - 10));
    out[192 + lane] = __reduce_max_sync(mask, static_cast<unsigned>(x[lane]));
}

// The last warp is not full, and lanes beyond n return before a full-mask shuffle that does not read them.
__global__ void partial_warp(const int* x, int* y, int n) {
    const int i = threadIdx.x;
    if (i >= n) return;
    y[i] = __shfl_sync(0xffffffffu, x[i], 0);
}

__global__ void tiles(const int* x, int* y) {
    namespace cg = cooperative_groups;
    const auto tile = cg::tiled_partition<8>(cg::this_thread_block());
    int value = x[threadIdx.x];
    for (unsigned step = tile.size() / 2; step > 0; step /= 2) value += tile.shfl_xor(value, step);
    tile.sync();
    y[threadIdx.x] =
        value + 1000 * static_cast<int>(tile.meta_group_rank()) + (tile.any(tile.thread_rank() == 3) ? 0 : 9);
}

// --- Atomics and fences -----------------------------------------------------------------------------------

__global__ void atomics(int* i, unsigned* u, unsigned long long* w, float* f, double* d, __half* h) {
    const int t = static_cast<int>(threadIdx.x);
    atomicAdd(&i[0], t);
    atomicMax(&i[1], t);
    atomicMin(&i[2], -t);
    atomicSub(&i[3], 1);
    atomicOr(&u[0], 1u << (t % 32));
    atomicAnd(&u[1], ~(1u << (t % 32)));
    atomicXor(&u[2], 1u);
    atomicInc(&u[3], 9u);
    atomicAdd(&w[0], 1ull);
    atomicExch(&w[1], 42ull);
    atomicAdd(&f[0], 0.5f);
    atomicAdd(&d[0], 0.25);
    atomicAdd(&h[0], __float2half(1.0f));
    // Compare and swap: the maximum of the squares, by hand.
    unsigned long long seen = w[2];
    while (seen < static_cast<unsigned long long>(t) * t) {
        const unsigned long long found = atomicCAS(&w[2], seen, static_cast<unsigned long long>(t) * t);
        if (found == seen) break;
        seen = found;
    }
}

// A lock that threads of a block spin on: the one that holds it must get to run.
__global__ void spin_lock(int* lock, int* value) {
    while (atomicCAS(lock, 0, 1) != 0) {
    }
    const int old = atomicAdd(value, 0);
    __nanosleep(100);
    atomicExch(value, old + 1);
    __threadfence();
    atomicExch(lock, 0);
}

// Sums x over the grid: the last block adds up the partial sums of all.
__global__ void last_block_done(const int* x, int* partial, unsigned* ticket, int* y) {
    __shared__ bool is_last;
    const int sum = __syncthreads_count(x[blockIdx.x * blockDim.x + threadIdx.x]);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();
        is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) {
        int total = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
        *y = total;
    }
}

// --- Cooperative launches
// ------------------------------------------------------------------------------------

// Normalises x by its sum: static and dynamic shared memory must survive the grid barrier.
__global__ void grid_sync(const int* x, int* partial, int* y) {
    namespace cg = cooperative_groups;
    GPU_LAYERS_DYNAMIC_SHARED(raw);
    int* kept = reinterpret_cast<int*>(raw);
    __shared__ int also_kept[32];
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    kept[threadIdx.x] = x[i];
    also_kept[threadIdx.x] = static_cast<int>(i);
    const int sum = __reduce_add_sync(0xffffffffu, x[i]);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
    cg::grid_group grid = cg::this_grid();
    grid.sync();
    int total = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
    cg::sync(grid);
    if (threadIdx.x == 0) partial[gridDim.x - 1 - blockIdx.x] = total;
    grid.sync();
    y[i] = kept[threadIdx.x] * partial[blockIdx.x] + also_kept[threadIdx.x] +
           (grid.is_valid() ? 0 : 1 << 20) + static_cast<int>(grid.thread_rank() - i);
}

// --- Arithmetic
// ----------------------------------------------------------------------------------------------

__global__ void integers(const unsigned* x, unsigned* out) {
    const unsigned a = x[0], b = x[1];
    out[0] = __popc(a);
    out[1] = __clz(static_cast<int>(b));
    out[2] = __ffs(static_cast<int>(a));
    out[3] = __brev(a);
    out[4] = __umulhi(a, b);
    const unsigned long long wide =
        __umul64hi(static_cast<unsigned long long>(a) << 32 | b, 0x9e3779b97f4a7c15ull);
    out[5] = static_cast<unsigned>(wide), out[6] = static_cast<unsigned>(wide >> 32);
    out[7] = __byte_perm(a, b, 0xdc98u);  // of a place three bits count
    out[8] = __funnelshift_l(a, b, 8);
    out[9] = min(a, b), out[10] = max(a, b);
    out[11] = static_cast<unsigned>(__mulhi(-5, 7)), out[12] = static_cast<unsigned>(max(-1, 3));
    out[13] = __popcll(0xffff0000ffffull), out[14] = __clzll(1), out[15] = __ffsll(1ll << 40);
}

__global__ void floats(const float* x, float* out) {
    const float a = x[0], b = x[1], nan = x[2];
    out[0] = fmaf(a, b, 1.0f);
    out[1] = rsqrtf(a);
    out[2] = __expf(a);
    out[3] = tanhf(a);
    out[4] = erff(a);
    out[5] = fmaxf(a, nan);
    out[6] = max(nan, b);
    out[7] = __fdividef(a, b);
    out[8] = __saturatef(b);
    out[9] = __uint_as_float(__float_as_uint(a) ^ 0x80000000u);
    out[10] = __frcp_rn(a);
    out[11] = static_cast<float>(__float2int_rn(2.5f)) + static_cast<float>(__float2int_rz(-2.7f));
    out[12] = static_cast<float>(__float2int_rd(-2.1f)) + static_cast<float>(__float2uint_rn(-3.0f));
    out[13] = static_cast<float>(__float2int_rn(nan));
    out[14] = static_cast<float>(__float2int_rn(1e20f));
    out[15] = a * b + 1.0f;  // two roundings: contraction is off
}

__global__ void doubles(const double* x, double* out) {
    out[0] = fma(x[0], x[1], 1.0);
    out[1] = rsqrt(x[0]);
    out[2] = exp(x[0]);
    out[3] = max(x[0], x[1]);
    out[4] = __longlong_as_double(__double_as_longlong(x[0]) + 1);
    out[5] = __hiloint2double(__double2hiint(x[1]), __double2loint(x[1]));
}

template <typename T>
__device__ float widen(T x);
template <>
__device__ float widen(__half x) {
    return __half2float(x);
}
template <>
__device__ float widen(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ void narrow(float x, __half* y) { *y = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }

template <typename T>
__global__ void half_round_trip(const float* x, T* y, float* back) {
    T value;
    narrow(x[threadIdx.x], &value);
    y[threadIdx.x] = value;
    back[threadIdx.x] = widen(value);
}

// fma with a single rounding, and functions that the CUDA headers have for the device only.
template <typename T>
__global__ void half_functions(const T* a, const T* b, const T* c, T* out, int n) {
    const int i = threadIdx.x;
    out[i] = __hfma(a[i], b[i], c[i]);
    out[n + i] = hexp(c[i]);
    out[2 * n + i] = __hmax_nan(a[i], b[i]);
    out[3 * n + i] = hfloor(a[i]);
    out[4 * n + i] = a[i] + b[i];
}

__global__ void half_pairs(const __half2* x, __half2* y, const __nv_bfloat162* u, __nv_bfloat162* v) {
    const unsigned t = threadIdx.x;
    y[t] = __hmax2_nan(__hadd2(x[t], x[t]), __float2half2_rn(0.0f));
    v[t] = __hfma2(u[t], u[t], __float22bfloat162_rn(make_float2(1.0f, 2.0f)));
}

// --- Vector memory
// ---------------------------------------------------------------------------------------------

struct __align__(16) EightHalves {
    __nv_bfloat16 values[8];
};
__global__ void vector_types(const float* x, float* y, const __nv_bfloat16* h, __nv_bfloat16* g) {
    float4 four = reinterpret_cast<const float4*>(x)[threadIdx.x];
    four.x += 1.0f, four.w -= 1.0f;
    reinterpret_cast<float4*>(y)[threadIdx.x] = four;
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(h) + threadIdx.x);
    EightHalves eight = *reinterpret_cast<const EightHalves*>(&raw);
#pragma unroll
    for (int i = 0; i < 8; ++i) eight.values[i] = __hneg(eight.values[i]);
    __stcs(reinterpret_cast<EightHalves*>(g) + threadIdx.x, eight);
}
