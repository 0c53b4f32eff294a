// A residual and what dropout leaves of a branch in one pass: y = residual + D(phi(x + bias)), or
// residual + phi(D(x + bias)); and backward with the sums that are the bias's gradient. The mask is regenerated.
//
// In every kernel, besides what activation_dropout.cu says:
//   bias         [features], along the last axis of x, of what T is computed in; or null
//   activation   its number, or kNoActivation
//   rows, sample_ids   see kept_in_rows
#include "activation_dropout.cuh"
#include "batch_norm_rules.cuh"
#include "gradient_bits.cuh"

// Blocks that must fit on a multiprocessor at once: with the bias, the residual or the sums besides, 80 registers.
constexpr int kBranchBlocks = 3;

// The identity, as an activation.
struct Identity {
    static constexpr bool kGradientIsBit = false;

    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return x;
    }

    template <typename A>
    static __device__ __forceinline__ A backward(A dy, A) {
        return dy;
    }
};

// As with_activation, of any or none.
template <typename T, typename Function>
__device__ __forceinline__ void with_activation_or_none(int number, Function f) {
    if (number == kNoActivation) {
        f(Identity());
    } else {
        with_activation<T>(number, f);
    }
}

// The bias of Count neighbours from `column` on; -0, which changes nothing, if there is none.
template <int Count, typename A>
__device__ __forceinline__ void load_bias(A (&values)[Count], const A* bias, unsigned long long column,
                                          unsigned long long features) {
    if (bias == nullptr) {
#pragma unroll
        for (int i = 0; i < Count; ++i) values[i] = A(-0.0);
    } else if (features % kOctet == 0) {
        const Vector<A, Count> loaded = Vector<A, Count>::load(bias + column);
#pragma unroll
        for (int i = 0; i < Count; ++i) values[i] = loaded[i];
    } else {
#pragma unroll
        for (int i = 0; i < Count; ++i) {
            values[i] = bias[column];
            column = column + 1 == features ? 0 : column + 1;
        }
    }
}

// y, and what the backward of ReLU needs.
//   x, residual, y   [n] T, 16-byte aligned; y may be either of the others
//   gradient_bits    [ceil(n / 8)] or null: bit i & 7 of byte i / 8 is set where element i is kept and x + bias
//                    is not <= 0. Bits beyond n are 0.
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride); a thread owns eight neighbours.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads, kBranchBlocks)
    dropout_add_forward(const T* x, const accumulate_t<T>* bias, const T* residual, T* y,
                        unsigned char* gradient_bits, long long n, Divisor64 features, int activation,
                        int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                        unsigned long long offset, const unsigned long long* draw, unsigned long long start,
                        DecisionRows rows, const long long* sample_ids) {
    using A = accumulate_t<T>;
    constexpr int part_width = kPart<T>;
    const DropoutStream stream = dropout_stream(seed, offset, draw, sample_ids != nullptr);
    const bool is_first = first != 0;
    const long long octets = n / kOctet;
    const long long step = static_cast<long long>(gridDim.x) * kElementwiseThreads;
    for (long long octet = blockIdx.x * static_cast<long long>(kElementwiseThreads) + threadIdx.x;
         octet < octets; octet += step) {
        const long long base = octet * kOctet;
        Vector<T, part_width> values = Vector<T, part_width>::load(x + base);
        Vector<T, part_width> added = Vector<T, part_width>::load(residual + base);
        const unsigned int kept =
            kept_in_rows<kOctet>(rule, stream, start, rows, sample_ids, static_cast<unsigned long long>(base));
        const unsigned long long row = features.quotient(static_cast<unsigned long long>(base));
        unsigned long long column = static_cast<unsigned long long>(base) - row * features.divisor;
        unsigned int not_clipped = 0;
        with_activation_or_none<T>(activation, [&](auto phi) {
            using Phi = decltype(phi);
#pragma unroll 1
            for (int part = 0; part < kOctet; part += part_width) {
                if (part != 0) {
                    values = Vector<T, part_width>::load(x + base + part);
                    added = Vector<T, part_width>::load(residual + base + part);
                }
                A biases[part_width];
                load_bias(biases, bias, column, features.divisor);
                if (part_width < kOctet)
                    for (column += part_width; column >= features.divisor;) column -= features.divisor;
#pragma unroll
                for (int i = 0; i < part_width; ++i) {
                    const A value = to_accumulate(values[i]) + biases[i];
                    if (Phi::kGradientIsBit && !(value <= A(0))) not_clipped |= 1u << (part + i);
                    const bool is_kept = kept >> (part + i) & 1u;
                    values[i] = from_accumulate<T>(
                        forward_element<Phi>(value, is_kept, is_first, rule.scale) + to_accumulate(added[i]));
                }
                values.store(y + base + part);
            }
        });
        if (gradient_bits != nullptr) gradient_bits[octet] = static_cast<unsigned char>(not_clipped & kept);
    }
    // What is left, less than an octet: by one thread, so that nobody reads what another has written already.
    const long long base = octets * kOctet;
    if (blockIdx.x != 0 || threadIdx.x != 0 || base == n) return;
    unsigned int passes = 0;
#pragma unroll 1
    for (int i = 0; base + i < n; ++i) {
        const unsigned long long at = static_cast<unsigned long long>(base + i);
        A biases[1];
        load_bias(biases, bias, at - features.quotient(at) * features.divisor, 1);
        const A value = to_accumulate(x[at]) + biases[0];
        const bool is_kept = kept_in_rows<1>(rule, stream, start, rows, sample_ids, at) != 0;
        if (is_kept && !(value <= A(0))) passes |= 1u << i;
        with_activation_or_none<T>(activation, [&](auto phi) {
            y[at] = from_accumulate<T>(forward_element<decltype(phi)>(value, is_kept, is_first, rule.scale) +
                                       to_accumulate(residual[at]));
        });
    }
    if (gradient_bits != nullptr) gradient_bits[octets] = static_cast<unsigned char>(passes);
}

// A sum, for the reductions.
template <typename A>
struct Sum {
    A value;

    static __device__ __forceinline__ Sum identity() { return {A(0)}; }
    __device__ __forceinline__ Sum combine(const Sum& other) const { return {value + other.value}; }
    __device__ __forceinline__ Sum shuffled_down(int delta) const {
        return {__shfl_down_sync(kFullWarp, value, delta)};
    }
};

// What for_each_in_row_part calls: gradients of Width neighbours in a row, added up for each feature.
template <typename T, int Width>
struct BranchGradients {
    using A = accumulate_t<T>;
    const T* dy;
    const T* x;
    const unsigned char* gradient_bits;
    T* dx;
    int activation;
    bool first;
    const DropoutRule<A>& rule;
    const DropoutStream& stream;
    unsigned long long start;
    const DecisionRows& rows;
    const long long* sample_ids;
    A biases[Width];
    Sum<A> sums[Width];

    __device__ __forceinline__ unsigned int kept(long long i) const {
        if (gradient_bits != nullptr) return static_cast<unsigned int>(gradient_bits[i / kOctet]) >> (i % kOctet);
        return kept_in_rows<Width>(rule, stream, start, rows, sample_ids, static_cast<unsigned long long>(i));
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> gradients[Count], values[Count];
        unsigned int passes[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            gradients[u] = Vector<T, Width>::load(dy + i + u * step);
            if (x != nullptr) values[u] = Vector<T, Width>::load(x + i + u * step);
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) passes[u] = kept(i + u * step);
        with_activation_or_none<T>(activation, [&](auto phi) {
#pragma unroll
            for (int u = 0; u < Count; ++u) {
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    const A value = x != nullptr ? to_accumulate(values[u][k]) + biases[k] : A(0);
                    const A result = backward_element<decltype(phi)>(to_accumulate(gradients[u][k]), value,
                                                                     passes[u] >> k & 1u, first, rule.scale);
                    sums[k].value += result;
                    gradients[u][k] = from_accumulate<T>(result);
                }
            }
        });
#pragma unroll
        for (int u = 0; u < Count; ++u) gradients[u].store(dx + i + u * step);
    }
};

// dx = scale * phi'(z) * dy, or scale * phi'(scale * z) * dy, with z = x + bias, where the element is kept, and
// +0 elsewhere; and the sums of dx, before it is rounded, over the rows.
//   x               null where the gradient does not depend on it: activation is kNoActivation then
//   gradient_bits   what the forward left: says where the gradient passes, instead of the mask; or null
//   sums            [features, parts], or null: nobody asks for them
// Launch: as for_each_in_row_part.
template <typename T, int Width>
__global__ void __launch_bounds__(kChannelThreads, kBranchBlocks)
    dropout_add_backward(const T* dy, const T* x, const accumulate_t<T>* bias,
                         const unsigned char* gradient_bits, T* dx, accumulate_t<T>* sums, int activation,
                         int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                         unsigned long long offset, const unsigned long long* draw, unsigned long long start,
                         DecisionRows rows, const long long* sample_ids, RowLayout layout) {
    using A = accumulate_t<T>;
    __shared__ Sum<A> scratch[kColumnScratch<Width>];
    const DropoutStream stream = dropout_stream(seed, offset, draw, sample_ids != nullptr);
    const int part = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, part);
    BranchGradients<T, Width> gradients{dy,     x,     gradient_bits, dx,         activation, first != 0, rule,
                                        stream, start, rows,          sample_ids, {},         {}};
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        gradients.sums[k] = Sum<A>::identity();
        gradients.biases[k] = bias != nullptr && channel < layout.channels ? bias[channel + k] : A(-0.0);
    }
    if (channel < layout.channels) for_each_in_row_part<1>(layout, channel, part, gradients);
    if (sums == nullptr) return;
    column_reduce(gradients.sums, scratch);
    if (threadIdx.y != 0 || channel >= layout.channels) return;
#pragma unroll
    for (int k = 0; k < Width; ++k) sums[(channel + k) * layout.parts + part] = gradients.sums[k].value;
}

// The gradient of the bias, from the sums of the parts: a warp for each feature.
//   sums    [features, parts]
//   dbias   [features]
// Launch: 1-D, a multiple of 32 threads, a thread a lane.
template <typename A>
__global__ void dropout_add_merge(const A* sums, A* dbias, long long features, long long parts) {
    const long long feature =
        (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (feature >= features) return;
    Sum<A> total = Sum<A>::identity();
    for (long long part = threadIdx.x % kWarpThreads; part < parts; part += kWarpThreads)
        total.value += sums[feature * parts + part];
    total = warp_reduce(total);
    if (threadIdx.x % kWarpThreads == 0) dbias[feature] = total.value;
}
