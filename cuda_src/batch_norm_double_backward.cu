// Gradients of the gradients of batch norm in training, with an activation that is straight on either side of
// 0.
//
// The backward takes dy, x, gamma to dx, dgamma, dbeta. With w = phi'(z) * dy, v = ddx, d = x - mean,
// xhat = d * inv_std, m values a channel and means over them:
//   dx = gamma * inv_std * (w - mean(w) - xhat * mean(w * xhat)), dgamma = sum(w * xhat), dbeta = sum(w).
// What follows is the gradient of sum(ddx * dx) + ddgamma * dgamma + ddbeta * dbeta + sum(ddresidual * w).
//
// In every kernel:
//   ddx, dy, x   T, one shape and layout, as in batch_norm.cu; residual the same, or null
//   mean, inv_std, gamma, beta   [channels], of the forward
//   activation   its number, or kNoActivation
#include "normalization.cuh"

// Of a channel: of v, v * d, w, w * d, v * w.
constexpr int kDoubleSums = 5;
template <typename A>
using DoubleSums = Sums<A, kDoubleSums>;

template <typename A>
__device__ __forceinline__ void add_double(DoubleSums<A>& sums, A v, A w, A d) {
    const A terms[] = {v, v * d, w, w * d, v * w};
#pragma unroll
    for (int i = 0; i < kDoubleSums; ++i) sums.of[i] += terms[i];
}

// Vectors of each array that a thread reads at once. Where it has registers for one only, with the numbers of
// all channels of a vector, so many are asked for ahead.
constexpr int kDoubleLoads = 2, kAskedAhead = 4;

// What the gradients of the elements of a channel are made of:
//   ddy = phi'(z) * (v_scale * v + d_scale * d + shift + ddresidual)
//   dx = d_scale * w + v_slope * v + d_slope * d + offset
template <typename A>
struct DoubleCoefficients {
    A v_scale, d_scale, shift, v_slope, d_slope, offset;
};

// What an element is, before the sums are known.
template <typename T, int Width, int Channels>
struct DoubleInputs {
    using A = accumulate_t<T>;
    const T* ddx;
    const T* dy;
    const T* x;
    const T* residual;
    PiecewiseLinearActivation<A> phi;
    Normalization<A> norms[Channels];

    // Calls take(v, w, d, z).
    template <typename Take>
    __device__ __forceinline__ void scalar(long long i, Take take) const {
        const A value = to_accumulate(x[i]);
        const A z = norms[0].apply(value) + residual_at(residual, i);
        take(to_accumulate(ddx[i]), phi.backward(to_accumulate(dy[i]), z), value - norms[0].mean, z);
    }

    struct Loaded {
        Vector<T, Width> v, gradients, values, added;
    };
    __device__ __forceinline__ Loaded load(long long i) const {
        return {Vector<T, Width>::load(ddx + i), Vector<T, Width>::load(dy + i),
                Vector<T, Width>::load(x + i), residual_at<T, Width>(residual, i)};
    }

    // Calls take(k, v, w, d, z) for value k of what was loaded.
    template <typename Take>
    __device__ __forceinline__ void of(const Loaded& loaded, Take take) const {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            const Normalization<A>& norm = norms[channel_of<Channels>(k)];
            const A value = widened(loaded.values, k);
            const A z = norm.apply(value) + widened(loaded.added, k);
            take(k, widened(loaded.v, k), phi.backward(widened(loaded.gradients, k), z), value - norm.mean,
                 z);
        }
    }
};

template <typename T, int Width, int Channels>
struct DoubleSummation {
    using A = accumulate_t<T>;
    DoubleInputs<T, Width, Channels> inputs;
    DoubleSums<A> sums[Channels];

    __device__ __forceinline__ void scalar(long long i) {
        inputs.scalar(i, [&](A v, A w, A d, A) { add_double(sums[0], v, w, d); });
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        typename DoubleInputs<T, Width, Channels>::Loaded loaded[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) loaded[u] = inputs.load(i + u * step);
#pragma unroll
        for (int u = 0; u < Count; ++u)
            inputs.of(loaded[u],
                      [&](int k, A v, A w, A d, A) { add_double(sums[channel_of<Channels>(k)], v, w, d); });
    }
};

template <typename A>
__device__ __forceinline__ void write_double_sums(const DoubleSums<A>& sums, A* partial_sums,
                                                  long long channel, long long rank, long long blocks) {
    A* partial = partial_sums + kDoubleSums * (channel * blocks + rank);
#pragma unroll
    for (int i = 0; i < kDoubleSums; ++i) partial[i] = sums.of[i];
}

// What the sums of a channel become.
//   ddgamma, ddbeta, dgamma   [channels]
//   coefficients   [6, channels], see DoubleCoefficients
//   inv_count      1 / m
template <typename A>
struct DoubleResults {
    const A* inv_std;
    const A* gamma;
    const A* ddgamma;
    const A* ddbeta;
    A* coefficients;
    A* dgamma;
    A inv_count;
    long long channels;

    __device__ __forceinline__ void write(const DoubleSums<A>& sums, long long channel) const {
        const A s = inv_std[channel], scale = gamma[channel] * s, a = ddgamma[channel];
        // Means of v, v * xhat, w, w * xhat.
        const auto [v, v_d, w, w_d, v_w] = sums.of;
        const A mean_v = v * inv_count, mean_v_xhat = v_d * s * inv_count;
        const A mean_w = w * inv_count, mean_w_xhat = w_d * s * inv_count;
        // Of v times what dx is a multiple of.
        const A product = v_w * inv_count - mean_v * mean_w - mean_v_xhat * mean_w_xhat;
        // q is the gradient of xhat: (a - scale * mean_v_xhat) * w - scale * mean_w_xhat * v.
        const A of_w = a - scale * mean_v_xhat;
        const A mean_q = of_w * mean_w - scale * mean_w_xhat * mean_v;
        const A mean_q_xhat = of_w * mean_w_xhat - scale * mean_w_xhat * mean_v_xhat;
        const DoubleCoefficients<A> result{scale,
                                           of_w * s,
                                           ddbeta[channel] - scale * mean_v,
                                           -scale * mean_w_xhat * s,
                                           -s * s * (mean_q_xhat + scale * product),
                                           -s * mean_q};
        A* column = coefficients + channel;
        column[0] = result.v_scale;
        column[channels] = result.d_scale;
        column[2 * channels] = result.shift;
        column[3 * channels] = result.v_slope;
        column[4 * channels] = result.d_slope;
        column[5 * channels] = result.offset;
        dgamma[channel] = s * product / inv_count;
    }
};

// The sums of the blocks; of one block what DoubleResults says.
//   partial_sums   [channels, blocks], see DoubleSums; null where there is one
//   others         see DoubleResults
// Launch: as batch_norm.cu.
template <typename T, typename Layout>
__global__ void __launch_bounds__(kChannelThreads, 2)
    batch_norm_double_sums(const T* ddx, const T* dy, const T* x, const T* residual,
                           accumulate_t<T>* partial_sums, const accumulate_t<T>* mean,
                           const accumulate_t<T>* inv_std, const accumulate_t<T>* gamma,
                           const accumulate_t<T>* beta, const accumulate_t<T>* ddgamma,
                           const accumulate_t<T>* ddbeta, accumulate_t<T>* coefficients,
                           accumulate_t<T>* dgamma, accumulate_t<T> inv_count, int activation,
                           Layout layout) {
    using A = accumulate_t<T>;
    constexpr int kChannels = Layout::kChannels;
    const DoubleResults<A> results{inv_std,      gamma,  ddgamma,   ddbeta,
                                   coefficients, dgamma, inv_count, layout.channels};
    __shared__ DoubleSums<A> scratch[kReductionScratch<Layout>];
    const auto block = layout.block();
    const bool exists = layout.has(block.channel);
    DoubleSummation<T, kLayoutWidth<T, Layout>, kChannels> body{
        {ddx, dy, x, residual, PiecewiseLinearActivation<A>(activation), {}}, {}};
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
        body.sums[k] = DoubleSums<A>::identity();
        if (exists) body.inputs.norms[k].load(mean, inv_std, gamma, beta, block.channel + k);
    }
    if (exists) for_each_in_block<T, kDoubleLoads>(layout, block.channel, block.rank, body);
    reduce_channels(layout, body.sums, scratch, [&](int k, const DoubleSums<A>& all) {
        if (!exists) return;
        if (layout.blocks > 1)
            write_double_sums(all, partial_sums, block.channel + k, block.rank, layout.blocks);
        else
            results.write(DoubleSums<A>::identity().combine(all), block.channel + k);
    });
}

// From the sums of several blocks what the elements are made of, and the gradient of gamma: a warp for each
// channel.
//   partial_sums   [channels, blocks], see DoubleSums
//   others         see DoubleResults
// Launch: 1-D, a multiple of 32 threads, a thread a lane.
template <typename A>
__global__ void batch_norm_double_merge(const A* partial_sums, const A* inv_std, const A* gamma,
                                        const A* ddgamma, const A* ddbeta, A* coefficients, A* dgamma,
                                        A inv_count, long long channels, long long blocks) {
    const long long channel = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (channel >= channels) return;
    DoubleSums<A> sums = DoubleSums<A>::identity();
#pragma unroll 8
    for (long long rank = threadIdx.x % kWarpThreads; rank < blocks; rank += kWarpThreads) {
        const A* partial = partial_sums + kDoubleSums * (channel * blocks + rank);
        sums = sums.combine({{partial[0], partial[1], partial[2], partial[3], partial[4]}});
    }
    sums = warp_reduce(sums);
    if (threadIdx.x % kWarpThreads != 0) return;
    DoubleResults<A>{inv_std, gamma, ddgamma, ddbeta, coefficients, dgamma, inv_count, channels}.write(
        sums, channel);
}

template <typename T, int Width, int Channels>
struct DoubleGradients {
    using A = accumulate_t<T>;
    DoubleInputs<T, Width, Channels> inputs;
    const T* ddresidual;
    T* ddy;
    T* dx;
    DoubleCoefficients<A> of_channels[Channels];
    // How far ahead of a vector others are asked for, and from where on there are none.
    long long ahead = 0, end = 0;

    __device__ __forceinline__ void ask_for(long long i) const {
        if (i >= end) return;
        prefetch(inputs.ddx + i);
        prefetch(inputs.dy + i);
        prefetch(inputs.x + i);
        if (inputs.residual != nullptr) prefetch(inputs.residual + i);
        if (ddresidual != nullptr) prefetch(ddresidual + i);
    }

    __device__ __forceinline__ void load(int k, const A* coefficients, long long channel,
                                         long long channels) {
        const A* column = coefficients + channel;
        of_channels[k] = {column[0],
                          column[channels],
                          column[2 * channels],
                          column[3 * channels],
                          column[4 * channels],
                          column[5 * channels]};
    }

    __device__ __forceinline__ A of_dy(const DoubleCoefficients<A>& c, A v, A d, A z, A added) const {
        return inputs.phi.backward(fma(c.v_scale, v, fma(c.d_scale, d, c.shift + added)), z);
    }

    __device__ __forceinline__ A of_x(const DoubleCoefficients<A>& c, A v, A w, A d) const {
        return fma(c.d_scale, w, fma(c.v_slope, v, fma(c.d_slope, d, c.offset)));
    }

    __device__ __forceinline__ void scalar(long long i) {
        inputs.scalar(i, [&](A v, A w, A d, A z) {
            ddy[i] = from_accumulate<T>(of_dy(of_channels[0], v, d, z, residual_at(ddresidual, i)));
            dx[i] = from_accumulate<T>(of_x(of_channels[0], v, w, d));
        });
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        ask_for(i + ahead);
        typename DoubleInputs<T, Width, Channels>::Loaded loaded[Count];
        Vector<T, Width> added[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            loaded[u] = inputs.load(i + u * step);
            added[u] = residual_at<T, Width>(ddresidual, i + u * step);
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            A of_gradients[Width], of_inputs[Width];
            inputs.of(loaded[u], [&](int k, A v, A w, A d, A z) {
                const DoubleCoefficients<A>& c = of_channels[channel_of<Channels>(k)];
                of_gradients[k] = of_dy(c, v, d, z, widened(added[u], k));
                of_inputs[k] = of_x(c, v, w, d);
            });
            rounded<T, Width>(of_gradients).store(ddy + i + u * step);
            rounded<T, Width>(of_inputs).store(dx + i + u * step);
        }
    }
};

// The gradients of dy and x.
//   ddy             may be dy, ddx or ddresidual
//   ddresidual      the gradient of that of the residual, or null
//   coefficients    [6, channels], see DoubleCoefficients
// Launch: as batch_norm.cu.
template <typename T, typename Layout>
__global__ void __launch_bounds__(kChannelThreads, 2)
    batch_norm_double_gradient(const T* ddx, const T* ddresidual, const T* dy, const T* x, const T* residual,
                               T* ddy, T* dx, const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                               const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                               const accumulate_t<T>* coefficients, int activation, Layout layout) {
    using A = accumulate_t<T>;
    constexpr int kChannels = Layout::kChannels;
    const auto block = layout.block();
    if (!layout.has(block.channel)) return;
    DoubleGradients<T, kLayoutWidth<T, Layout>, kChannels> body{
        {ddx, dy, x, residual, PiecewiseLinearActivation<A>(activation), {}}, ddresidual, ddy, dx, {}};
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
        body.inputs.norms[k].load(mean, inv_std, gamma, beta, block.channel + k);
        body.load(k, coefficients, block.channel + k, layout.channels);
    }
    if constexpr (kChannels > 1) {
        const BlockRows rows(layout, block.rank);
        const long long apart = blockDim.y * layout.channels;
        const long long first = (rows.begin + threadIdx.y) * layout.channels + block.channel;
        body.ahead = kAskedAhead * apart;
        body.end = (rows.begin + rows.rows) * layout.channels;
#pragma unroll
        for (int n = 1; n < kAskedAhead; ++n) body.ask_for(first + n * apart);
    }
    constexpr int kLoads = Layout::kIsNchw ? kDoubleLoads : 1;
    for_each_in_block<T, kLoads>(layout, block.channel, block.rank, body);
}
