// Batch normalisation in two reads of the data: statistics (or gradient sums) of each channel, then the
// result.
//
// A channel is spread over several blocks, whose number depends on the shape alone; each writes its partial
// result, and a warp a channel merges them in a fixed order (a single block's result needs no merging). No
// atomics: the bits are the same in every run.
#include "channel_layout.cuh"
#include "moments.cuh"

// Where the statistics of each channel go.
//   partial_moments      [channels, parts] count, mean - origin, m2, origin: the channel's first value.
//   Unused, and
//                        may be null, where a channel has a single part
//   mean, var, inv_std   [channels] mean, biased variance, 1 / sqrt(variance + eps)
template <typename A>
struct StatisticsResult {
    A* partial_moments;
    A *mean, *var, *inv_std;
    A eps;

    __device__ __forceinline__ void write(const Moments<A>& moments, A origin, long long channel,
                                          long long part, long long parts) const {
        if (parts == 1) {
            finish(moments, origin, channel);
            return;
        }
        A* partial = partial_moments + 4 * (channel * parts + part);
        partial[0] = moments.count;
        partial[1] = moments.mean;
        partial[2] = moments.m2;
        partial[3] = origin;
    }

    __device__ __forceinline__ void finish(const Moments<A>& moments, A origin, long long channel) const {
        const A variance = moments.m2 / moments.count;
        mean[channel] = origin + moments.mean;
        var[channel] = variance;
        inv_std[channel] = A(1) / sqrt(variance + eps);
    }
};

// Where the sums of the gradients of each channel go.
//   partial_sums    [channels, parts] of dy, of dy * (x - mean). Unused, and may be null, as above
//   inv_std         [channels]
//   dgamma, dbeta   [channels] inv_std * sum dy * (x - mean), sum dy
template <typename A>
struct GradientResult {
    A* partial_sums;
    const A* inv_std;
    A *dgamma, *dbeta;

    __device__ __forceinline__ void write(const GradientSums<A>& sums, long long channel, long long part,
                                          long long parts) const {
        if (parts == 1) {
            finish(sums, channel);
            return;
        }
        A* partial = partial_sums + 2 * (channel * parts + part);
        partial[0] = sums.dy;
        partial[1] = sums.dy_deviation;
    }

    __device__ __forceinline__ void finish(const GradientSums<A>& sums, long long channel) const {
        dgamma[channel] = sums.dy_deviation * inv_std[channel];
        dbeta[channel] = sums.dy;
    }
};

// ---- statistics -----------------------------------------------------------------------------------------

// The bodies below are what for_each_in_plane_part and for_each_in_row_part call. A thread has vectors of
// Width values, which are of `Channels` channels: of 1 in planes, of Width in rows.
template <int Channels>
constexpr int channel_of(int k) {
    return Channels == 1 ? 0 : k;
}

template <typename T, int Width, int Channels>
struct Statistics {
    using A = accumulate_t<T>;
    const T* x;
    MomentsAccumulator<A> values[Channels];
    int count;  // of each channel

    __device__ __forceinline__ void scalar(long long i) {
        const A value = to_accumulate(x[i]);
        if (count == 0) values[0].shift = value;
        values[0].add(value);
        count += 1;
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> loaded[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) loaded[u] = Vector<T, Width>::load(x + i + u * step);
        if (Count == 1 && count == 0) {
#pragma unroll
            for (int c = 0; c < Channels; ++c) values[c].shift = to_accumulate(loaded[0][c]);
        }
#pragma unroll
        for (int k = 0; k < Width; ++k) {
#pragma unroll
            for (int u = 0; u < Count; ++u) values[channel_of<Channels>(k)].add(to_accumulate(loaded[u][k]));
        }
        count += Count * (Width / Channels);
    }
};

// Statistics of each channel of planes: final ones, or partial ones to be merged.
//   x   [batch, channels, plane] T, 16-byte aligned
//   partial_moments, mean, var, inv_std, eps   see StatisticsResult
// Launch: blockDim (x, y) of kChannelThreads in all; channels * parts blocks.
template <typename T>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_statistics_planes(const T* x, accumulate_t<T>* partial_moments, accumulate_t<T>* mean,
                                 accumulate_t<T>* var, accumulate_t<T>* inv_std, accumulate_t<T> eps,
                                 PlaneLayout layout) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> warp_values[kChannelThreads / kWarpThreads];
    const int channel = blockIdx.x / static_cast<int>(layout.parts);
    const int part = blockIdx.x - channel * static_cast<int>(layout.parts);
    const A origin = to_accumulate(x[channel * layout.plane]);
    Statistics<T, kVectorWidth<T>, 1> statistics{x, {}, 0};
    for_each_in_plane_part<T, kReductionLoads>(layout, channel, part, statistics);
    const Moments<A> moments =
        block_reduce(statistics.values[0].moments(statistics.count, origin), warp_values);
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        const StatisticsResult<A> result{partial_moments, mean, var, inv_std, eps};
        result.write(moments, origin, channel, part, layout.parts);
    }
}

// Combines the values of the threads y of each column, for Width channels at once.
//   scratch   [Width * kChannelThreads] in shared memory
// All threads of the block must call it, blockDim.y a power of two; those with threadIdx.y == 0 get the
// result.
template <int Width, typename Value>
__device__ __forceinline__ void column_reduce(Value (&values)[Width], Value* scratch) {
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    for (unsigned int half = blockDim.y / 2; half > 0; half /= 2) {
        if (threadIdx.y >= half && threadIdx.y < 2 * half) {
#pragma unroll
            for (int k = 0; k < Width; ++k) scratch[k * kChannelThreads + thread] = values[k];
        }
        __syncthreads();
        if (threadIdx.y < half) {
#pragma unroll
            for (int k = 0; k < Width; ++k)
                values[k] = values[k].combine(scratch[k * kChannelThreads + thread + half * blockDim.x]);
        }
        // The next step writes the rows below half, which nobody reads in this one: no second barrier.
    }
}

// As batch_norm_statistics_planes, for rows.
//   x   [rows, channels] T, 16-byte aligned; channels a multiple of Width
// Launch: blockDim (x, y) of kChannelThreads in all, y a power of two; tiles * parts blocks.
template <typename T, int Width>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_statistics_rows(const T* x, accumulate_t<T>* partial_moments, accumulate_t<T>* mean,
                               accumulate_t<T>* var, accumulate_t<T>* inv_std, accumulate_t<T> eps,
                               RowLayout layout) {
    using A = accumulate_t<T>;
    __shared__ Moments<A> scratch[Width * kChannelThreads];
    const int part = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, part);
    Statistics<T, Width, Width> statistics{x, {}, 0};
    if (channel < layout.channels) for_each_in_row_part<kReductionLoads>(layout, channel, part, statistics);
    Moments<A> moments[Width];
    A origins[Width];
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        origins[k] = channel < layout.channels ? to_accumulate(x[channel + k]) : A(0);
        moments[k] = statistics.values[k].moments(statistics.count, origins[k]);
    }
    column_reduce(moments, scratch);
    if (threadIdx.y != 0 || channel >= layout.channels) return;
    const StatisticsResult<A> result{partial_moments, mean, var, inv_std, eps};
#pragma unroll
    for (int k = 0; k < Width; ++k) result.write(moments[k], origins[k], channel + k, part, layout.parts);
}

// Statistics of each channel, from those of its parts; see StatisticsResult.
// Launch: a warp a channel; blockDim.x a multiple of 32.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_merge_statistics(const A* partial_moments, A* mean, A* var, A* inv_std, A eps,
                                long long channels, long long parts) {
    const int lane = threadIdx.x % kWarpThreads;
    const long long channel = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (channel >= channels) return;
    Moments<A> moments = Moments<A>::identity();
    for (long long part = lane; part < parts; part += kWarpThreads) {
        const A* partial = partial_moments + 4 * (channel * parts + part);
        moments = moments.combine({partial[0], partial[1], partial[2]});
    }
    moments = warp_reduce(moments);
    if (lane != 0) return;
    const StatisticsResult<A> result{nullptr, mean, var, inv_std, eps};
    result.finish(moments, partial_moments[4 * channel * parts + 3], channel);
}

// ---- normalisation ---------------------------------------------------------------------------------------

// y = scale * (x - mean) + shift, in that order: a value that is the mean gives exactly shift.
template <typename A>
struct Normalization {
    A mean, scale, shift;

    // mean, gamma, beta may be null: 0, 1, 0.
    __device__ __forceinline__ void load(const A* mean_c, const A* inv_std_c, const A* gamma_c,
                                         const A* beta_c, long long channel) {
        mean = mean_c ? mean_c[channel] : A(0);
        scale = gamma_c ? gamma_c[channel] * inv_std_c[channel] : inv_std_c[channel];
        shift = beta_c ? beta_c[channel] : A(0);
    }

    __device__ __forceinline__ A apply(A x) const { return fma(x - mean, scale, shift); }
};

template <typename T, int Width, int Channels>
struct Normalize {
    const T* x;
    T* y;
    Normalization<accumulate_t<T>> rules[Channels];

    __device__ __forceinline__ void scalar(long long i) {
        y[i] = from_accumulate<T>(rules[0].apply(to_accumulate(x[i])));
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> values[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) values[u] = Vector<T, Width>::load(x + i + u * step);
#pragma unroll
        for (int u = 0; u < Count; ++u) {
#pragma unroll
            for (int k = 0; k < Width; ++k)
                values[u][k] =
                    from_accumulate<T>(rules[channel_of<Channels>(k)].apply(to_accumulate(values[u][k])));
            values[u].store(y + i + u * step);
        }
    }
};

// y = gamma * (x - mean) * inv_std + beta.
//   x, y      [batch, channels, plane] T, 16-byte aligned
//   mean, inv_std, gamma, beta   [channels]; mean, gamma, beta may be null (0, 1, 0)
// Launch: as batch_norm_statistics_planes.
template <typename T>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_normalize_planes(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                                const accumulate_t<T>* gamma, const accumulate_t<T>* beta, T* y,
                                PlaneLayout layout) {
    const int channel = blockIdx.x / static_cast<int>(layout.parts);
    Normalize<T, kVectorWidth<T>, 1> normalize{x, y, {}};
    normalize.rules[0].load(mean, inv_std, gamma, beta, channel);
    for_each_in_plane_part<T, kElementwiseLoads>(
        layout, channel, blockIdx.x - channel * static_cast<int>(layout.parts), normalize);
}

// As batch_norm_normalize_planes, for rows.
//   x, y   [rows, channels] T, 16-byte aligned; channels a multiple of Width
// Launch: as batch_norm_statistics_rows.
template <typename T, int Width>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_normalize_rows(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                              const accumulate_t<T>* gamma, const accumulate_t<T>* beta, T* y,
                              RowLayout layout) {
    const int part = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, part);
    if (channel >= layout.channels) return;
    Normalize<T, Width, Width> normalize{x, y, {}};
#pragma unroll
    for (int k = 0; k < Width; ++k) normalize.rules[k].load(mean, inv_std, gamma, beta, channel + k);
    for_each_in_row_part<kElementwiseLoads>(layout, channel, part, normalize);
}

// ---- gradients -------------------------------------------------------------------------------------------

template <typename T, int Width, int Channels>
struct ParameterGradients {
    using A = accumulate_t<T>;
    const T* dy;
    const T* x;
    A mean[Channels];
    GradientSums<A> sums[Channels];

    __device__ __forceinline__ void scalar(long long i) {
        sums[0].add(to_accumulate(dy[i]), to_accumulate(x[i]) - mean[0]);
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> gradients[Count], values[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            gradients[u] = Vector<T, Width>::load(dy + i + u * step);
            values[u] = Vector<T, Width>::load(x + i + u * step);
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) {
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const int c = channel_of<Channels>(k);
                sums[c].add(to_accumulate(gradients[u][k]), to_accumulate(values[u][k]) - mean[c]);
            }
        }
    }
};

// Gradients of the parameters of each channel of planes: final ones, or partial ones to be merged.
//   dy, x   [batch, channels, plane] T, 16-byte aligned
//   mean    [channels]
//   partial_sums, inv_std, dgamma, dbeta   see GradientResult
// Launch: as batch_norm_statistics_planes.
template <typename T>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_gradient_sums_planes(const T* dy, const T* x, const accumulate_t<T>* mean,
                                    accumulate_t<T>* partial_sums, const accumulate_t<T>* inv_std,
                                    accumulate_t<T>* dgamma, accumulate_t<T>* dbeta, PlaneLayout layout) {
    using A = accumulate_t<T>;
    __shared__ GradientSums<A> warp_values[kChannelThreads / kWarpThreads];
    const int channel = blockIdx.x / static_cast<int>(layout.parts);
    const int part = blockIdx.x - channel * static_cast<int>(layout.parts);
    ParameterGradients<T, kVectorWidth<T>, 1> gradient{dy, x, {mean[channel]}, {GradientSums<A>::identity()}};
    for_each_in_plane_part<T, kReductionLoads / 2>(layout, channel, part, gradient);
    const GradientSums<A> sums = block_reduce(gradient.sums[0], warp_values);
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        const GradientResult<A> result{partial_sums, inv_std, dgamma, dbeta};
        result.write(sums, channel, part, layout.parts);
    }
}

// As batch_norm_gradient_sums_planes, for rows.
//   dy, x   [rows, channels] T, 16-byte aligned; channels a multiple of Width
// Launch: as batch_norm_statistics_rows.
template <typename T, int Width>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_gradient_sums_rows(const T* dy, const T* x, const accumulate_t<T>* mean,
                                  accumulate_t<T>* partial_sums, const accumulate_t<T>* inv_std,
                                  accumulate_t<T>* dgamma, accumulate_t<T>* dbeta, RowLayout layout) {
    using A = accumulate_t<T>;
    __shared__ GradientSums<A> scratch[Width * kChannelThreads];
    const int part = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, part);
    ParameterGradients<T, Width, Width> gradient{dy, x, {}, {}};
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        gradient.mean[k] = channel < layout.channels ? mean[channel + k] : A(0);
        gradient.sums[k] = GradientSums<A>::identity();
    }
    if (channel < layout.channels) for_each_in_row_part<kReductionLoads / 2>(layout, channel, part, gradient);
    column_reduce(gradient.sums, scratch);
    if (threadIdx.y != 0 || channel >= layout.channels) return;
    const GradientResult<A> result{partial_sums, inv_std, dgamma, dbeta};
#pragma unroll
    for (int k = 0; k < Width; ++k) result.write(gradient.sums[k], channel + k, part, layout.parts);
}

// Gradients of the parameters of each channel, from the sums of its parts; see GradientResult.
// Launch: a warp a channel; blockDim.x a multiple of 32.
template <typename A>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_merge_gradients(const A* partial_sums, const A* inv_std, A* dgamma, A* dbeta,
                               long long channels, long long parts) {
    const int lane = threadIdx.x % kWarpThreads;
    const long long channel = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (channel >= channels) return;
    GradientSums<A> sums = GradientSums<A>::identity();
    for (long long part = lane; part < parts; part += kWarpThreads) {
        const A* partial = partial_sums + 2 * (channel * parts + part);
        sums = sums.combine({partial[0], partial[1]});
    }
    sums = warp_reduce(sums);
    if (lane != 0) return;
    const GradientResult<A> result{nullptr, inv_std, dgamma, dbeta};
    result.finish(sums, channel);
}

// dx = gamma * inv_std * (dy - dbeta / m - (x - mean) * inv_std * dgamma / m).
template <typename A>
struct InputGradient {
    A mean, scale, mean_dy, slope;

    // gamma may be null: 1. inv_count: 1 / m.
    __device__ __forceinline__ void load(const A* mean_c, const A* inv_std_c, const A* gamma_c,
                                         const A* dgamma_c, const A* dbeta_c, A inv_count,
                                         long long channel) {
        const A inv_std = inv_std_c[channel];
        mean = mean_c[channel];
        scale = gamma_c ? gamma_c[channel] * inv_std : inv_std;
        mean_dy = dbeta_c[channel] * inv_count;
        slope = inv_std * (dgamma_c[channel] * inv_count);
    }

    __device__ __forceinline__ A apply(A dy, A x) const { return fma(mean - x, slope, dy - mean_dy) * scale; }
};

template <typename T, int Width, int Channels>
struct InputGradients {
    const T* dy;
    const T* x;
    T* dx;
    InputGradient<accumulate_t<T>> rules[Channels];

    __device__ __forceinline__ void scalar(long long i) {
        dx[i] = from_accumulate<T>(rules[0].apply(to_accumulate(dy[i]), to_accumulate(x[i])));
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> gradients[Count], values[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            gradients[u] = Vector<T, Width>::load(dy + i + u * step);
            values[u] = Vector<T, Width>::load(x + i + u * step);
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) {
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const accumulate_t<T> dy_k = to_accumulate(gradients[u][k]),
                                      x_k = to_accumulate(values[u][k]);
                values[u][k] = from_accumulate<T>(rules[channel_of<Channels>(k)].apply(dy_k, x_k));
            }
            values[u].store(dx + i + u * step);
        }
    }
};

// Gradient of the input, in training.
//   dy, x, dx   [batch, channels, plane] T, 16-byte aligned
//   mean, inv_std, gamma, dgamma, dbeta   [channels]; gamma may be null (1)
//   inv_count   1 / values of a channel
// Launch: as batch_norm_statistics_planes.
template <typename T>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_input_gradient_planes(const T* dy, const T* x, const accumulate_t<T>* mean,
                                     const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                     const accumulate_t<T>* dgamma, const accumulate_t<T>* dbeta, T* dx,
                                     accumulate_t<T> inv_count, PlaneLayout layout) {
    const int channel = blockIdx.x / static_cast<int>(layout.parts);
    InputGradients<T, kVectorWidth<T>, 1> gradient{dy, x, dx, {}};
    gradient.rules[0].load(mean, inv_std, gamma, dgamma, dbeta, inv_count, channel);
    for_each_in_plane_part<T, kElementwiseLoads / 2>(
        layout, channel, blockIdx.x - channel * static_cast<int>(layout.parts), gradient);
}

// As batch_norm_input_gradient_planes, for rows.
//   dy, x, dx   [rows, channels] T, 16-byte aligned; channels a multiple of Width
// Launch: as batch_norm_statistics_rows.
template <typename T, int Width>
__global__ void __launch_bounds__(kChannelThreads, kChannelBlocks)
    batch_norm_input_gradient_rows(const T* dy, const T* x, const accumulate_t<T>* mean,
                                   const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                                   const accumulate_t<T>* dgamma, const accumulate_t<T>* dbeta, T* dx,
                                   accumulate_t<T> inv_count, RowLayout layout) {
    const int part = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, part);
    if (channel >= layout.channels) return;
    InputGradients<T, Width, Width> gradient{dy, x, dx, {}};
#pragma unroll
    for (int k = 0; k < Width; ++k)
        gradient.rules[k].load(mean, inv_std, gamma, dgamma, dbeta, inv_count, channel + k);
    for_each_in_row_part<kElementwiseLoads / 2>(layout, channel, part, gradient);
}
