// What the kernels that read once share: where a block keeps what it read, and the backward from any source
// of gradients. See batch_norm_persistent.cu.
#pragma once

#include "batch_norm_backward.cuh"
#include "group_barrier.cuh"

// Two blocks, of half of the shared memory each: while one waits the other works.
constexpr int kPersistentBlocks = 2;

#ifdef GPU_LAYERS_EMULATED
#define PERSISTENT_SHARED(name)              \
    GPU_LAYERS_DYNAMIC_SHARED(name##_bytes); \
    uint4* const name = reinterpret_cast<uint4*>(name##_bytes)
#else
#define PERSISTENT_SHARED(name) extern __shared__ uint4 name[]
#endif

// This block's group and part.
struct GroupBlock {
    int rank, group, groups;

    __device__ __forceinline__ explicit GroupBlock(long long blocks)
        : rank(static_cast<int>(blockIdx.x % static_cast<unsigned int>(blocks))),
          group(static_cast<int>(blockIdx.x / static_cast<unsigned int>(blocks))),
          groups(static_cast<int>(gridDim.x / static_cast<unsigned int>(blocks))) {}
};

// What one thread keeps, in the order in which it came. No other thread looks at it.
template <typename T, int Width>
struct SharedCache {
    uint4* slot;

    __device__ __forceinline__ explicit SharedCache(uint4* slots) : slot(slots + linear_thread()) {}

    __device__ __forceinline__ void put(const Vector<T, Width>& vector) {
        *slot = vector.words[0];
        slot += kChannelThreads;
    }
    __device__ __forceinline__ void put(T value) {
        *reinterpret_cast<T*>(slot) = value;
        slot += kChannelThreads;
    }
    __device__ __forceinline__ Vector<T, Width> get_vector() {
        Vector<T, Width> vector;
        vector.words[0] = *slot;
        slot += kChannelThreads;
        return vector;
    }
    __device__ __forceinline__ T get() {
        const T value = *reinterpret_cast<const T*>(slot);
        slot += kChannelThreads;
        return value;
    }
};

// The channels of a tile whose blocks this warp merges: calls merge(channel).
template <int Width, typename Merge>
__device__ __forceinline__ void for_each_channel_to_merge(const NhwcLayout& layout, int tile, int rank,
                                                          Merge merge) {
    const long long first = static_cast<long long>(tile) * blockDim.x * Width;
    const int channels =
        static_cast<int>(min(static_cast<long long>(blockDim.x) * Width, layout.channels - first));
    const int blocks = static_cast<int>(layout.blocks);
    for (int c = rank + linear_thread() / kWarpThreads * blocks; c < channels;
         c += kChannelThreads / kWarpThreads * blocks)
        merge(first + c);
}

// Keeps x, and the gradient of the activation's input, which the type holds exactly: it is that of y, or 0.
template <typename T, int Width, int Channels, typename Source>
struct CacheGradients {
    using A = accumulate_t<T>;
    Source source;
    const T* x;
    const T* residual;
    ClippingActivation<A> phi;
    SharedCache<T, Width> cached_x, cached_dz;
    Normalization<A> rules[Channels];
    GradientSums<A> sums[Channels];

    __device__ __forceinline__ void scalar(long long i) {
        const T x_i = x[i];
        const A value = to_accumulate(x_i);
        const A dz =
            phi.backward(to_accumulate(source.scalar(i)), rules[0].apply(value) + residual_at(residual, i));
        cached_x.put(x_i);
        cached_dz.put(from_accumulate<T>(dz));
        sums[0].add(dz, value - rules[0].mean);
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        typename Source::Loaded loaded[Count];
        Vector<T, Width> values[Count], added[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            loaded[u] = source.load(i + u * step);
            values[u] = Vector<T, Width>::load(x + i + u * step);
            added[u] = residual_at<T, Width>(residual, i + u * step);
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            cached_x.put(values[u]);
            Vector<T, Width> gradients = source.of(loaded[u]);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const int c = channel_of<Channels>(k);
                const A value = to_accumulate(values[u][k]);
                const A z = rules[c].apply(value) + to_accumulate(added[u][k]);
                const A dz = phi.backward(to_accumulate(gradients[k]), z);
                gradients[k] = from_accumulate<T>(dz);
                sums[c].add(dz, value - rules[c].mean);
            }
            cached_dz.put(gradients);
        }
    }
};

template <typename T, int Width, int Channels>
struct InputGradientsCached {
    using A = accumulate_t<T>;
    SharedCache<T, Width> cached_x, cached_dz;
    T* dx;
    T* dresidual;
    Normalization<A> rules[Channels];
    InputGradient<A> input_rules[Channels];

    __device__ __forceinline__ void scalar(long long i) {
        const A value = to_accumulate(cached_x.get());
        const T dz = cached_dz.get();
        dx[i] = from_accumulate<T>(input_rules[0].apply(to_accumulate(dz), value, rules[0]));
        if (dresidual != nullptr) dresidual[i] = dz;
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            Vector<T, Width> values = cached_x.get_vector();
            const Vector<T, Width> gradients = cached_dz.get_vector();
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const int c = channel_of<Channels>(k);
                values[k] = from_accumulate<T>(
                    input_rules[c].apply(to_accumulate(gradients[k]), to_accumulate(values[k]), rules[c]));
            }
            values.store(dx + i + u * step);
            if (dresidual != nullptr) gradients.store(dresidual + i + u * step);
        }
    }
};

//   source       of dy, see batch_norm_backward.cuh
//   activation   none or ReLU, whose gradient is exact
//   slots       those of x, and then those of dz
//   Loads        vectors in flight
template <typename T, int Loads, typename Source>
__device__ __forceinline__ void backward_persistent_nchw(const Source& source, const T* x,
                                                         const ChannelArrays<accumulate_t<T>>& of_channels,
                                                         const T* residual, int activation,
                                                         const GradientResult<accumulate_t<T>>& result, T* dx,
                                                         T* dresidual, unsigned int* barrier_count,
                                                         accumulate_t<T> inv_count, int slots_of_x,
                                                         uint4* slots, const NchwLayout& layout) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>;
    __shared__ GradientSums<A> warp_values[kChannelThreads / kWarpThreads];
    __shared__ ChannelGradients<A> of_channel;
    uint4* const slots_of_dz = slots + slots_of_x * kChannelThreads;
    const GroupBlock block(layout.blocks);
    unsigned int expected = 0;
    for (int channel = block.group; channel < layout.channels; channel += block.groups) {
        CacheGradients<T, kWidth, 1, Source> keep{source,
                                                  x,
                                                  residual,
                                                  ClippingActivation<A>(activation),
                                                  SharedCache<T, kWidth>(slots),
                                                  SharedCache<T, kWidth>(slots_of_dz),
                                                  {},
                                                  {GradientSums<A>::identity()}};
        of_channels.load(keep.rules[0], channel);
        for_each_in_nchw_block<T, Loads, Source::kWhole>(layout, channel, block.rank, keep);
        GradientSums<A> sums = block_reduce(keep.sums[0], warp_values);
        if (layout.blocks > 1) {
            if (linear_thread() == 0) result.write_partial(sums, channel, block.rank, layout.blocks);
            expected += static_cast<unsigned int>(layout.blocks);
            group_barrier(barrier_count + block.group, expected);
            if (linear_thread() < kWarpThreads)
                sums = merged_sums(result.partial_sums, channel, layout.blocks);
        }
        if (linear_thread() == 0) {
            of_channel = result.finished(sums, channel);
            if (block.rank == 0) result.write(of_channel, channel);
        }
        __syncthreads();
        InputGradientsCached<T, kWidth, 1> gradients{SharedCache<T, kWidth>(slots),
                                                     SharedCache<T, kWidth>(slots_of_dz),
                                                     dx,
                                                     dresidual,
                                                     {keep.rules[0]},
                                                     {}};
        gradients.input_rules[0].set(of_channels.inv_std[channel], of_channel.dgamma, of_channel.dbeta,
                                     inv_count);
        for_each_in_nchw_block<T, Loads, Source::kWhole>(layout, channel, block.rank, gradients);
    }
}

template <typename T, int Width, typename Source>
__device__ __forceinline__ void backward_persistent_nhwc(const Source& source, const T* x,
                                                         const ChannelArrays<accumulate_t<T>>& of_channels,
                                                         const T* residual, int activation,
                                                         const GradientResult<accumulate_t<T>>& result, T* dx,
                                                         T* dresidual, unsigned int* barrier_count,
                                                         accumulate_t<T> inv_count, int slots_of_x,
                                                         uint4* slots, const NhwcLayout& layout) {
    using A = accumulate_t<T>;
    __shared__ GradientSums<A> scratch[kColumnScratch<Width>];
    uint4* const slots_of_dz = slots + slots_of_x * kChannelThreads;
    const GroupBlock block(layout.blocks);
    const unsigned int blocks = static_cast<unsigned int>(layout.blocks);
    unsigned int expected = 0;
    for (int tile = block.group; tile < layout.tiles; tile += block.groups) {
        const long long channel = channel_of_tile<Width>(tile);
        const bool exists = channel < layout.channels;
        CacheGradients<T, Width, Width, Source> keep{source,
                                                     x,
                                                     residual,
                                                     ClippingActivation<A>(activation),
                                                     SharedCache<T, Width>(slots),
                                                     SharedCache<T, Width>(slots_of_dz),
                                                     {},
                                                     {}};
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            keep.sums[k] = GradientSums<A>::identity();
            if (exists) of_channels.load(keep.rules[k], channel + k);
        }
        if (exists) for_each_in_nhwc_block<1>(layout, channel, block.rank, keep);
        column_reduce(keep.sums, scratch);
        if (threadIdx.y == 0 && exists) {
#pragma unroll
            for (int k = 0; k < Width; ++k)
                result.write(keep.sums[k], channel + k, block.rank, layout.blocks);
        }
        if (blocks > 1) {
            group_barrier(barrier_count + block.group, expected += blocks);
            for_each_channel_to_merge<Width>(layout, tile, block.rank, [&](long long of_tile) {
                const GradientSums<A> merged = merged_sums(result.partial_sums, of_tile, layout.blocks);
                if (linear_thread() % kWarpThreads == 0)
                    result.write(result.finished(merged, of_tile), of_tile);
            });
            group_barrier(barrier_count + block.group, expected += blocks);
        } else {
            __syncthreads();
        }
        if (!exists) continue;
        InputGradientsCached<T, Width, Width> gradients{
            SharedCache<T, Width>(slots), SharedCache<T, Width>(slots_of_dz), dx, dresidual, {}, {}};
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            gradients.rules[k] = keep.rules[k];
            gradients.input_rules[k].load(of_channels.inv_std, result.dgamma, result.dbeta, inv_count,
                                          channel + k);
        }
        for_each_in_nhwc_block<1>(layout, channel, block.rank, gradients);
    }
}
