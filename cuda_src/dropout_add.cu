// A residual and what dropout leaves of a branch in one pass: y = residual + D(phi(x + bias)), or
// residual + phi(D(x + bias)); and backward with the sums that are the bias's gradient. The mask is regenerated.
//
// In every kernel, besides what activation_dropout.cu says:
//   bias               [features], along the last axis of x, of what T is computed in; or null
//   activation         its number, or kNoActivation
//   rows, sample_ids   see kept_in_rows
#include "activation_dropout.cuh"
#include "batch_norm_rules.cuh"
#include "gradient_bits.cuh"

// Straight: no activation, or ReLU, and decisions that are simply numbered: what is as fast as the memory. With
// these activations both orders are the same, and the gradient needs one bit an element at most.
//
// Blocks that must fit on a multiprocessor at once: with functions, the bias and the sums, 80 registers a thread.
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
template <typename T, bool Straight>
__global__ void __launch_bounds__(kElementwiseThreads, kBranchBlocks)
    dropout_add_forward(const T* x, const accumulate_t<T>* bias, const T* residual, T* y,
                        unsigned char* gradient_bits, long long n, Divisor64 features, int activation,
                        int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                        unsigned long long offset, const unsigned long long* draw, unsigned long long start,
                        DecisionRows rows, const long long* sample_ids) {
    using A = accumulate_t<T>;
    constexpr int part_width = kPart<T>, unroll = Straight ? kOctetUnroll<T> : 1;
    const DropoutStream stream = dropout_stream(seed, offset, draw, sample_ids != nullptr);
    const bool is_first = first != 0, clips = activation == 0;
    const long long octets = n / kOctet;
    const long long tile = static_cast<long long>(kElementwiseThreads) * unroll;
    for (long long tile_first = blockIdx.x * tile; tile_first < octets; tile_first += gridDim.x * tile) {
        Vector<T, part_width> values[unroll], added[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            const long long octet = tile_first + u * kElementwiseThreads + threadIdx.x;
            if (octet >= octets) break;
            values[u] = Vector<T, part_width>::load(x + octet * kOctet);
            added[u] = Vector<T, part_width>::load(residual + octet * kOctet);
        }
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            const long long octet = tile_first + u * kElementwiseThreads + threadIdx.x;
            if (octet >= octets) break;
            const long long base = octet * kOctet;
            const unsigned long long i0 = static_cast<unsigned long long>(base);
            unsigned long long column = i0 - features.quotient(i0) * features.divisor;
            A biases[part_width];
            // Early, where there are registers for it.
            if (Straight) load_bias(biases, bias, column, features.divisor);
            const unsigned int kept = Straight
                                          ? kept_neighbours<kOctet>(rule, stream, start + i0)
                                          : kept_in_rows<kOctet>(rule, stream, start, rows, sample_ids, i0);
            unsigned int clipped = 0;
            const auto each_part = [&](auto branch) {
#pragma unroll 1
                for (int part = 0; part < kOctet; part += part_width) {
                    if (part != 0) {
                        values[u] = Vector<T, part_width>::load(x + base + part);
                        added[u] = Vector<T, part_width>::load(residual + base + part);
                        for (column += part_width; column >= features.divisor;) column -= features.divisor;
                    }
                    if (!Straight || part != 0) load_bias(biases, bias, column, features.divisor);
#pragma unroll
                    for (int i = 0; i < part_width; ++i) {
                        const A z = widened(values[u], i) + biases[i];
                        if (clips && z <= A(0)) clipped |= 1u << (part + i);
                        values[u][i] = from_accumulate<T>(
                            branch(z, kept >> (part + i) & 1u, clipped >> (part + i) & 1u) + widened(added[u], i));
                    }
                    values[u].store(y + base + part);
                }
            };
            if constexpr (Straight) {
                each_part([&](A z, bool is_kept, bool is_clipped) {
                    return is_kept && !is_clipped ? z * rule.scale : A(0);
                });
            } else {
                with_activation_or_none<T>(activation, [&](auto phi) {
                    each_part([&](A z, bool is_kept, bool) {
                        return forward_element<decltype(phi)>(z, is_kept, is_first, rule.scale);
                    });
                });
            }
            if (gradient_bits != nullptr)
                gradient_bits[octet] = static_cast<unsigned char>(kept & ~clipped);
        }
    }
    // What is left, less than an octet: by one thread, which writes its byte of bits.
    const long long base = octets * kOctet;
    if (blockIdx.x != 0 || threadIdx.x != 0 || base == n) return;
    unsigned int passes = 0;
#pragma unroll 1
    for (int i = 0; base + i < n; ++i) {
        const unsigned long long at = static_cast<unsigned long long>(base + i);
        const A z = to_accumulate(x[at]) +
                    (bias == nullptr ? A(-0.0) : bias[at - features.quotient(at) * features.divisor]);
        const bool is_kept = kept_in_rows<1>(rule, stream, start, rows, sample_ids, at) != 0;
        if (is_kept && !(z <= A(0))) passes |= 1u << i;
        A branch;
        with_activation_or_none<T>(activation, [&](auto phi) {
            branch = forward_element<decltype(phi)>(z, is_kept, is_first, rule.scale);
        });
        y[at] = from_accumulate<T>(branch + to_accumulate(residual[at]));
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
template <typename T, int Width, bool Straight>
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
    A biases[Width];  // unless Straight
    Sum<A> sums[Width];

    __device__ __forceinline__ unsigned int passing(long long i) const {
        if (gradient_bits != nullptr)
            return static_cast<unsigned int>(gradient_bits[i / kOctet]) >> static_cast<int>(i % kOctet);
        const unsigned long long at = static_cast<unsigned long long>(i);
        return Straight ? kept_neighbours<Width>(rule, stream, start + at)
                        : kept_in_rows<Width>(rule, stream, start, rows, sample_ids, at);
    }

    __device__ __forceinline__ T taken(int k, A gradient) {
        sums[k].value += gradient;
        return from_accumulate<T>(gradient);
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> gradients[Count], values[Count];
        unsigned int passes[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            gradients[u] = Vector<T, Width>::load(dy + i + u * step);
            if (!Straight && x != nullptr) values[u] = Vector<T, Width>::load(x + i + u * step);
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) passes[u] = passing(i + u * step);
        if constexpr (Straight) {
#pragma unroll
            for (int u = 0; u < Count; ++u) {
#pragma unroll
                for (int k = 0; k < Width; ++k) {
                    const A gradient = to_accumulate(gradients[u][k]) * rule.scale;
                    gradients[u][k] = taken(k, passes[u] >> k & 1u ? gradient : A(0));
                }
            }
        } else {
            with_activation_or_none<T>(activation, [&](auto phi) {
#pragma unroll
                for (int u = 0; u < Count; ++u) {
#pragma unroll
                    for (int k = 0; k < Width; ++k) {
                        const A z = x == nullptr ? A(0) : to_accumulate(values[u][k]) + biases[k];
                        gradients[u][k] =
                            taken(k, backward_element<decltype(phi)>(to_accumulate(gradients[u][k]), z,
                                                                     passes[u] >> k & 1u, first, rule.scale));
                    }
                }
            });
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) gradients[u].store(dx + i + u * step);
    }
};

// dx = scale * phi'(z) * dy, or scale * phi'(scale * z) * dy, with z = x + bias, where the element is kept, and
// +0 elsewhere; and the sums of dx, before it is rounded, over the rows.
//   x, bias         null where the gradient does not depend on them: activation is kNoActivation then
//   gradient_bits   what the forward left, for ReLU: says where the gradient passes, instead of the mask; or null
//   sums            [features, parts], or null: nobody asks for them
// Launch: as for_each_in_row_part.
template <typename T, int Width, bool Straight>
__global__ void __launch_bounds__(kChannelThreads, Straight ? 4 : kBranchBlocks)
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
    BranchGradients<T, Width, Straight> gradients{dy,   x,      gradient_bits, dx,   activation, first != 0,
                                                  rule, stream, start,         rows, sample_ids, {},
                                                  {}};
#pragma unroll
    for (int k = 0; k < Width; ++k) {
        gradients.sums[k] = Sum<A>::identity();
        if (!Straight)
            gradients.biases[k] = bias != nullptr && channel < layout.channels ? bias[channel + k] : A(-0.0);
    }
    if (channel < layout.channels)
        for_each_in_row_part<Straight ? 2 : 1>(layout, channel, part, gradients);
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
