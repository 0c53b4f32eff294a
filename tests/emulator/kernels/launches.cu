// Parameter lists of every kind, for the checks of a launch.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__global__ void scale(const float* x, float* y, float factor) { y[threadIdx.x] = x[threadIdx.x] * factor; }

enum Choice : unsigned { kFirst, kSecond };
__global__ void every_type(double, __half, __nv_bfloat16, bool, signed char, unsigned char, short,
                           unsigned short, int, unsigned, long long, unsigned long long, long, const float,
                           Choice) {}

struct Window {
    int size[3];
    float scale;
    long long stride;
};
__global__ void by_struct(Window, void*, const float4*) {}

__global__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

__global__ void too_much_shared(float* y) {
    __shared__ float tile[1 << 14];
    for (int i = 0; i < 1 << 14; ++i) tile[i] = 1.0f;
    y[0] = tile[5];
}
