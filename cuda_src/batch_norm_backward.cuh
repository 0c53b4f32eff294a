// The gradients of batch norm, from wherever that of its output comes: an array, or what pools the output.
//
// A source of gradients has, for the vector at an index of the array x,
//   Loaded               what it reads for one
//   load(i), of(loaded)  the vector of gradients in two steps, so that several loads are in flight
//   scalar(i)            a single one, unless
//   kWhole               planes consist of whole vectors
//   kIsArray, array()    it is an array of x's shape
// and, for the kernels that read once, of planes,
//   kIsKept              all of a block's gradients are kept before the first is taken: of an array they are
//                        fetched; if it is none, fill() leaves them in the slots of their threads, and ask()
//                        asks for what it will read
#pragma once

#include "normalization.cuh"

// dy, of x's shape.
template <typename T, typename Layout>
struct GradientArray {
    static constexpr bool kWhole = false, kIsArray = true, kIsKept = true;
    using Loaded = Vector<T, kLayoutWidth<T, Layout>>;
    const T* dy;

    __device__ __forceinline__ const T* array() const { return dy; }
    __device__ __forceinline__ T scalar(long long i) const { return dy[i]; }
    __device__ __forceinline__ Loaded load(long long i) const { return Loaded::load(dy + i); }
    __device__ __forceinline__ const Loaded& of(const Loaded& loaded) const { return loaded; }
};

// The gradient of the activation's input, which if kIdentity is that of y.
//   source                    of dy
//   x, residual, activation   as in batch_norm.cu; the residual is not used unless kAddsResidual
template <typename T, int Width, Epilogue Fused, typename Source>
struct GradientBeforeActivation {
    using A = accumulate_t<T>;
    Source source;
    const T* x;
    const T* residual;
    int activation;

    // Calls take(gradient, x).
    template <typename Take>
    __device__ __forceinline__ void scalar(long long i, const Normalization<A>& norm, Take take) const {
        const A value = to_accumulate(x[i]);
        A gradient = to_accumulate(source.scalar(i));
        if (Fused != kIdentity) {
            A z = norm.apply(value);
            if (kAddsResidual<Fused>) z += residual_at(residual, i);
            with_fused_activation<T, Fused>(activation,
                                            [&](auto phi) { gradient = phi.backward(gradient, z); });
        }
        take(gradient, value);
    }

    // Calls take(u, k, gradient, x) for value k of vector u, at i + u * step.
    //   some   which of the values count: of the others nothing is taken
    template <int Count, int Channels, typename Some, typename Take>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some,
                                            const Normalization<A> (&norms)[Channels], Take take) const {
        typename Source::Loaded loaded[Count];
        Vector<T, Width> values[Count], added[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.any(u)) continue;
            loaded[u] = source.load(i + u * step);
            values[u] = Vector<T, Width>::load(x + i + u * step);
            if (kAddsResidual<Fused>) added[u] = residual_at<T, Width>(residual, i + u * step);
        }
        const auto each = [&](auto backward) {
#pragma unroll
            for (int u = 0; u < Count; ++u) {
                if (!some.any(u)) continue;
                const Vector<T, Width>& gradients = source.of(loaded[u]);
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    if (!some.has(u, k)) continue;
                    const A value = widened(values[u], k);
                    take(u, k, backward(widened(gradients, k), value, u, k), value);
                }
            }
        };
        if (Fused == kIdentity) {
            each([](A gradient, A, int, int) { return gradient; });
            return;
        }
        with_fused_activation<T, Fused>(activation, [&](auto phi) {
            each([&](A gradient, A value, int u, int k) {
                A z = norms[channel_of<Channels>(k)].apply(value);
                if (kAddsResidual<Fused>) z += widened(added[u], k);
                return phi.backward(gradient, z);
            });
        });
    }
};

template <typename T, int Width, int Channels, Epilogue Fused, typename Source>
struct ParameterGradients {
    using A = accumulate_t<T>;
    static constexpr bool kTakesFew = true;
    GradientBeforeActivation<T, Width, Fused, Source> gradient;
    Normalization<A> norms[Channels];  // if kIdentity only the mean is used
    Sums<A, 2> sums[Channels];

    __device__ __forceinline__ void scalar(long long i, bool counts = true) {
        if (counts)
            gradient.scalar(i, norms[0], [&](A dz, A x) { add_gradient(sums[0], dz, x - norms[0].mean); });
    }

    template <int Count, typename Some = AllOfVectors>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some = {}) {
        gradient.template vectors<Count>(i, step, some, norms, [&](int, int k, A dz, A x) {
            const int c = channel_of<Channels>(k);
            add_gradient(sums[c], dz, x - norms[c].mean);
        });
    }
};

// dx = gamma * inv_std * (dz - dbeta / m - (x - mean) * inv_std * dgamma / m).
template <typename A>
struct InputGradient {
    A mean_dz, slope;

    // dgamma and dbeta may be null: the statistics were given, and do not depend on x. inv_count: 1 / m.
    __device__ __forceinline__ void load(const A* inv_std_c, const A* dgamma_c, const A* dbeta_c, A inv_count,
                                         long long channel) {
        if (dgamma_c != nullptr) set(inv_std_c[channel], dgamma_c[channel], dbeta_c[channel], inv_count);
    }

    __device__ __forceinline__ void set(A inv_std, A dgamma, A dbeta, A inv_count) {
        mean_dz = dbeta * inv_count;
        slope = inv_std * (dgamma * inv_count);
    }

    __device__ __forceinline__ A apply(A dz, A x, const Normalization<A>& norm) const {
        return apply_below(dz, norm.mean - x, norm);
    }
    // Of an input that is so much below the mean.
    __device__ __forceinline__ A apply_below(A dz, A below, const Normalization<A>& norm) const {
        return fma(below, slope, dz - mean_dz) * norm.scale;
    }
};

//   depends     whether the statistics depend on x
//   dresidual   as in batch_norm.cu; may be null, and is not written to unless kAddsResidual
template <typename T, int Width, int Channels, Epilogue Fused, typename Source>
struct InputGradients {
    using A = accumulate_t<T>;
    static constexpr bool kTakesFew = true;
    GradientBeforeActivation<T, Width, Fused, Source> gradient;
    Normalization<A> norms[Channels];  // if kIdentity the shift is not used
    InputGradient<A> input_gradients[Channels];
    bool depends;
    T* dx;
    T* dresidual;

    __device__ __forceinline__ A apply(A dz, A x, int c) const {
        // A slope of 0 would not do: x may be infinite. A sum, for zeros are +0, as of a normalisation of dz.
        return Fused != kIdentity && !depends ? fma(dz, norms[c].scale, A(0))
                                              : input_gradients[c].apply(dz, x, norms[c]);
    }

    __device__ __forceinline__ void scalar(long long i, bool counts = true) {
        if (!counts) {
            dx[i] = from_accumulate<T>(A(0));
            if (kAddsResidual<Fused> && dresidual != nullptr) dresidual[i] = from_accumulate<T>(A(0));
            return;
        }
        gradient.scalar(i, norms[0], [&](A dz, A x) {
            dx[i] = from_accumulate<T>(apply(dz, x, 0));
            if (kAddsResidual<Fused> && dresidual != nullptr) dresidual[i] = from_accumulate<T>(dz);
        });
    }

    template <int Count, typename Some = AllOfVectors>
    __device__ __forceinline__ void vectors(long long i, long long step, const Some& some = {}) {
        A results[Count][Width] = {}, passed[Count][Width] = {};
        gradient.template vectors<Count>(i, step, some, norms, [&](int u, int k, A dz, A x) {
            results[u][k] = apply(dz, x, channel_of<Channels>(k));
            passed[u][k] = dz;
        });
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            if (!some.exists(u)) continue;
            rounded<T, Width>(results[u]).store(dx + i + u * step);
            if (kAddsResidual<Fused> && dresidual != nullptr)
                rounded<T, Width>(passed[u]).store(dresidual + i + u * step);
        }
    }
};

// Of each channel, as in batch_norm.cu: mean, gamma, beta may be null.
template <typename A>
struct ChannelArrays {
    const A *mean, *inv_std, *gamma, *beta;

    __device__ __forceinline__ void load(Normalization<A>& norm, long long channel) const {
        norm.load(mean, inv_std, gamma, beta, channel);
    }
};

// ---- two reads -------------------------------------------------------------------------------------------
//
//   const GradientResult<accumulate_t<T>> result{partial_sums, inv_std, dgamma, dbeta};
//   sum_gradients<kIdentity, 1>({{dy}, x, nullptr, kNoActivation}, {mean, inv_std, gamma, beta}, result,
//   layout);
//
// Loads: vectors in flight. Launch: as batch_norm.cu.

// Calls body for all values of a block, which takes their gradients of the source. Threads without a channel
// take part where the source needs them.
template <typename T, int Loads, typename Source, typename Layout, typename Block, typename Body,
          typename Valid>
__device__ __forceinline__ void for_each_with_gradient(const Source&, const Layout& layout, bool exists,
                                                       const Block& block, Body& body, const Valid& valid) {
    if (exists) for_each_in_block<T, Loads, Source::kWhole>(layout, block.channel, block.rank, body, valid);
}

template <typename T, Epilogue Fused, int Loads, typename Source, typename Layout,
          typename Valid = AllPositions>
__device__ __forceinline__ void sum_gradients(
    const GradientBeforeActivation<T, kLayoutWidth<T, Layout>, Fused, Source>& gradient,
    const ChannelArrays<accumulate_t<T>>& of_channels, const GradientResult<accumulate_t<T>>& result,
    const Layout& layout, const Valid& valid = {}) {
    using A = accumulate_t<T>;
    constexpr int kChannels = Layout::kChannels;
    __shared__ Sums<A, 2> scratch[kReductionScratch<Layout>];
    const auto block = layout.block();
    const bool exists = layout.has(block.channel);
    ParameterGradients<T, kLayoutWidth<T, Layout>, kChannels, Fused, Source> gradients{gradient, {}, {}};
#pragma unroll
    for (int k = 0; k < kChannels; ++k) gradients.sums[k] = Sums<A, 2>::identity();
    if (exists) {
#pragma unroll
        for (int k = 0; k < kChannels; ++k) of_channels.load(gradients.norms[k], block.channel + k);
    }
    for_each_with_gradient<T, Loads>(gradient.source, layout, exists, block, gradients, valid);
    reduce_channels(layout, gradients.sums, scratch, [&](int k, const Sums<A, 2>& all) {
        if (exists) write_result(result, all, block.channel + k, block.rank, layout.blocks);
    });
}

//   dgamma, dbeta, dx, dresidual, inv_count   as in batch_norm.cu
template <typename T, Epilogue Fused, typename Source, typename Layout, typename Valid = AllPositions>
__device__ __forceinline__ void find_input_gradients(
    const GradientBeforeActivation<T, kLayoutWidth<T, Layout>, Fused, Source>& gradient,
    const ChannelArrays<accumulate_t<T>>& of_channels, const accumulate_t<T>* dgamma,
    const accumulate_t<T>* dbeta, T* dx, T* dresidual, accumulate_t<T> inv_count, const Layout& layout,
    const Valid& valid = {}) {
    constexpr int kChannels = Layout::kChannels;
    const auto block = layout.block(number_from_the_end());
    if (!layout.has(block.channel)) return;
    InputGradients<T, kLayoutWidth<T, Layout>, kChannels, Fused, Source> gradients{
        gradient, {}, {}, dgamma != nullptr, dx, dresidual};
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
        of_channels.load(gradients.norms[k], block.channel + k);
        gradients.input_gradients[k].load(of_channels.inv_std, dgamma, dbeta, inv_count, block.channel + k);
    }
    for_each_in_block<T, kInputGradientLoads<Layout, Fused, Valid>, Source::kWhole, true>(
        layout, block.channel, block.rank, gradients, valid);
}
