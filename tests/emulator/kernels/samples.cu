// Two kernels of the kinds this project is about, to measure the emulator with.

__device__ __forceinline__ uint4 philox4x32_10(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        const unsigned high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return counter;
}

// Drops elements of x by Philox; four at a time.   Launch: 1-D, grid-stride; n a multiple of 4
__global__ void dropout(const float* x, float* y, unsigned drop_below, float scale, unsigned seed,
                        long long n) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long g = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x; g < n / 4;
         g += stride) {
        const uint4 word = philox4x32_10(
            make_uint4(static_cast<unsigned>(g), static_cast<unsigned>(g >> 32), 0, 0), make_uint2(seed, 0));
        float4 value = reinterpret_cast<const float4*>(x)[g];
        value.x = word.x < drop_below ? 0.0f : value.x * scale;
        value.y = word.y < drop_below ? 0.0f : value.y * scale;
        value.z = word.z < drop_below ? 0.0f : value.z * scale;
        value.w = word.w < drop_below ? 0.0f : value.w * scale;
        reinterpret_cast<float4*>(y)[g] = value;
    }
}

__device__ __forceinline__ float sum_of_block(float value, float* partial) {
    for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(0xffffffffu, value, delta);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
    if (threadIdx.x < 32) {
        for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(0xffffffffu, value, delta);
    }
    __syncthreads();
    return value;
}

// Mean and sum of squared differences of one channel for each block.   x: [channels, n], n a multiple of 4
__global__ void channel_statistics(const float* x, float* mean, float* m2, int n) {
    __shared__ float partial[32];
    __shared__ float centre;
    const float* mine = x + static_cast<long long>(blockIdx.x) * n;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n / 4; i += blockDim.x) {
        const float4 value = reinterpret_cast<const float4*>(mine)[i];
        sum += value.x + value.y + (value.z + value.w);
    }
    sum = sum_of_block(sum, partial);
    if (threadIdx.x == 0) mean[blockIdx.x] = centre = sum / static_cast<float>(n);
    __syncthreads();
    float squares = 0.0f;
    for (int i = threadIdx.x; i < n / 4; i += blockDim.x) {
        const float4 value = reinterpret_cast<const float4*>(mine)[i];
        const float a = value.x - centre, b = value.y - centre, c = value.z - centre, d = value.w - centre;
        squares += a * a + b * b + (c * c + d * d);
    }
    squares = sum_of_block(squares, partial);
    if (threadIdx.x == 0) m2[blockIdx.x] = squares;
}
