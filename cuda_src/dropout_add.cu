// A residual and what dropout leaves of a branch in one pass: y = residual + D(phi(x + bias)), or
// residual + phi(D(x + bias)); and backward with the sums that are the bias's gradient. The mask is
// regenerated.
//
// In every kernel, besides what activation_dropout.cu says:
//   bias               [features], along the last axis of x, of what T is computed in; or null
//   activation         its number, or kNoActivation
//   rows, sample_ids   see kept_in_rows
#include "activation_dropout.cuh"
#include "batch_norm_rules.cuh"
#include "gradient_bits.cuh"

// Straight: no activation, or ReLU, and decisions that are simply numbered: what is as fast as the memory.
// With these activations both orders are the same, and the gradient needs one bit an element at most.
//
// Blocks that must fit on a multiprocessor at once: with functions, the bias and the sums, 80 registers a
// thread.
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

// f(activation, order), see with_ordered_activation, for any or none; if Straight, for none or ReLU, of which
// both orders are the same.
template <typename T, bool Straight, typename Function>
__device__ __forceinline__ void with_branch(int number, bool first, Function f) {
    if (number == kNoActivation) {
        f(Identity(), Constant<false>());
    } else if constexpr (Straight) {
        f(Relu(), Constant<false>());
    } else {
        with_ordered_activation<T>(number, first, f);
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
//   gradient_bits    [ceil(n / 8)] or null: bit i & 7 of byte i / 8 is set where element i is kept and x +
//   bias
//                    is not <= 0. Bits beyond n are 0.
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride); a thread owns eight neighbours.
template <typename T, bool Straight>
__global__ void __launch_bounds__(kElementwiseThreads, kBranchBlocks)
    dropout_add_forward(const T* x, const accumulate_t<T>* bias, const T* residual, T* y,
                        unsigned char* gradient_bits, long long n, Divisor64 features, int activation,
                        int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                        unsigned long long offset, const unsigned long long* rng_state,
                        unsigned long long start, DecisionRows rows, const long long* sample_ids) {
    using A = accumulate_t<T>;
    constexpr int unroll = Straight ? kOctetUnroll<T> : 1, width = kPart<T>;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state, sample_ids != nullptr);
    const long long whole = n / kOctet * kOctet;
    for_each_tile<unroll, kOctet>(whole, [&](const TilePart<unroll, kOctet>& part) {
        OctetDecisions<T, unroll> decisions;
        unsigned int passing[unroll] = {};
#pragma unroll 1
        for (int done = 0; done < kOctet; done += width) {
            Vector<T, width> values[unroll], added[unroll];
            part.load(values, x, done);
            part.load(added, residual, done);
            A biases[unroll][width];
            const auto load_biases = [&] {
#pragma unroll
                for (int u = 0; u < unroll; ++u) {
                    const unsigned long long at =
                        static_cast<unsigned long long>(part.first + part.at(u) + done);
                    load_bias(biases[u], bias, at - features.quotient(at) * features.divisor,
                              features.divisor);
                }
            };
            // Before the words are drawn, where there are registers for both: one wait less.
            if (sizeof(T) == 2) load_biases();
            if (done == 0)
                decisions = OctetDecisions<T, unroll>(rule, part.with_places([&](const auto& places) {
                    using Words = NeighbourWords<kOctet, unroll>;
                    if constexpr (Straight)
                        return Words::of(stream, start, places);
                    else
                        return words_in_rows<kOctet>(rule, stream, start, rows, sample_ids, places, whole);
                }));
            if (sizeof(T) != 2) load_biases();
            with_branch<T, Straight>(activation, first != 0, [&](auto phi, auto order) {
#pragma unroll
                for (int u = 0; u < unroll; ++u) {
                    A results[width];
#pragma unroll
                    for (int i = 0; i < width; ++i) {
                        const A z = widened(values[u], i) + biases[u][i];
                        const bool is_kept = decisions.keeps(rule, u, done + i);
                        results[i] =
                            widened(added[u], i) + forward_element<decltype(phi), order.kValue>(
                                                       z, is_kept, rule.scale, 1u << (done + i), passing[u]);
                    }
                    values[u] = rounded<T, width>(results);
                }
            });
            part.store(values, y, done);
        }
        if (gradient_bits != nullptr) store_octet_bits(gradient_bits, passing, part);
    });
    // What is left, less than an octet: by one thread, which writes its byte of bits.
    if (blockIdx.x != 0 || threadIdx.x != 0 || whole == n) return;
    unsigned int passing = 0;
#pragma unroll 1
    for (int i = 0; whole + i < n; ++i) {
        const unsigned long long at = static_cast<unsigned long long>(whole + i);
        const A z = to_accumulate(x[at]) +
                    (bias == nullptr ? A(-0.0) : bias[at - features.quotient(at) * features.divisor]);
        const bool is_kept = kept_in_rows<1>(rule, stream, start, rows, sample_ids, at) != 0;
        if (is_kept && !(z <= A(0))) passing |= 1u << i;
        A branch;
        with_branch<T, Straight>(activation, first != 0, [&](auto phi, auto order) {
            branch = forward_element<decltype(phi), order.kValue>(z, is_kept, rule.scale);
        });
        y[at] = from_accumulate<T>(branch + to_accumulate(residual[at]));
    }
    if (gradient_bits != nullptr) gradient_bits[whole / kOctet] = static_cast<unsigned char>(passing);
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

// What for_each_in_nhwc_block calls: gradients of Width neighbours in a row, added up for each feature.
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
    const A* bias;  // of the thread's features, or null
    Sum<A> sums[Width];

    // gradients[u], element k: of those that `keeps` says.
    template <int Count, typename Keeps>
    __device__ __forceinline__ void take_straight(Vector<T, Width> (&gradients)[Count], Keeps keeps) {
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            A results[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const A gradient = widened(gradients[u], k) * rule.scale;
                results[k] = keeps(u, k) ? gradient : A(0);
                sums[k].value += results[k];
            }
            gradients[u] = rounded<T, Width>(results);
        }
    }

    template <int Count>
    __device__ __forceinline__ void vectors(long long i, long long step) {
        Vector<T, Width> gradients[Count], values[Count];
        long long places[Count];
#pragma unroll
        for (int u = 0; u < Count; ++u) {
            places[u] = i + u * step;
            gradients[u] = Vector<T, Width>::load(dy + places[u]);
            if (!Straight && x != nullptr) values[u] = Vector<T, Width>::load(x + places[u]);
        }
        if constexpr (Straight) {
            if (gradient_bits != nullptr) {
                unsigned int bits[Count];
#pragma unroll
                for (int u = 0; u < Count; ++u)
                    bits[u] = static_cast<unsigned int>(gradient_bits[places[u] / kOctet]) >>
                              static_cast<int>(places[u] % kOctet);
                take_straight(gradients, [&](int u, int k) { return (bits[u] >> k & 1u) != 0; });
            } else {
                const auto drawn = NeighbourWords<Width, Count>::of(stream, start, places);
                take_straight(gradients, [&](int u, int k) { return rule.keeps(drawn.words[u][k]); });
            }
        } else {
#pragma unroll
            for (int u = 0; u < Count; ++u) {
                const auto drawn =
                    words_in_rows<Width, 1>(rule, stream, start, rows, sample_ids, {places[u]});
                // One register in place of as many as there are words.
                unsigned int kept = 0;
#pragma unroll
                for (int k = 0; k < Width; ++k) kept |= (rule.keeps(drawn.words[0][k]) ? 1u : 0u) << k;
                // Each time, from the cache: there are no registers to keep them in.
                Vector<A, Width> biases;
                if (bias != nullptr) biases = Vector<A, Width>::load(bias);
                with_branch<T, false>(activation, first, [&](auto phi, auto order) {
                    A results[Width];
#pragma unroll
                    for (int k = 0; k < Width; ++k) {
                        const A z = x == nullptr
                                        ? A(0)
                                        : widened(values[u], k) + (bias == nullptr ? A(-0.0) : biases[k]);
                        results[k] = backward_element<decltype(phi), decltype(order)::kValue>(
                            widened(gradients[u], k), z, (kept >> k & 1u) != 0, rule.scale);
                        sums[k].value += results[k];
                    }
                    gradients[u] = rounded<T, Width>(results);
                });
            }
        }
#pragma unroll
        for (int u = 0; u < Count; ++u) gradients[u].store(dx + i + u * step);
    }
};

// dx = scale * phi'(z) * dy, or scale * phi'(scale * z) * dy, with z = x + bias, where the element is kept,
// and +0 elsewhere; and the sums of dx, before it is rounded, over the rows.
//   x, bias         null where the gradient does not depend on them: activation is kNoActivation then
//   gradient_bits   what the forward left, for ReLU: says where the gradient passes, instead of the mask; or
//   null sums            [features, blocks], or null: nobody asks for them
// Launch: as for_each_in_nhwc_block.
template <typename T, int Width, bool Straight>
__global__ void __launch_bounds__(kChannelThreads, Straight && sizeof(T) == 2 ? 4 : kBranchBlocks)
    dropout_add_backward(const T* dy, const T* x, const accumulate_t<T>* bias,
                         const unsigned char* gradient_bits, T* dx, accumulate_t<T>* sums, int activation,
                         int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                         unsigned long long offset, const unsigned long long* rng_state,
                         unsigned long long start, DecisionRows rows, const long long* sample_ids,
                         NhwcLayout layout) {
    using A = accumulate_t<T>;
    __shared__ Sum<A> scratch[kColumnScratch<Width>];
    const DropoutStream stream = dropout_stream(seed, offset, rng_state, sample_ids != nullptr);
    const int rank = blockIdx.x / static_cast<int>(layout.tiles);
    const long long channel = first_channel<Width>(layout, rank);
    const A* const of_features = bias == nullptr ? nullptr : bias + channel;
    BranchGradients<T, Width, Straight> gradients{dy,   x,      gradient_bits, dx,   activation, first != 0,
                                                  rule, stream, start,         rows, sample_ids, of_features,
                                                  {}};
#pragma unroll
    for (int k = 0; k < Width; ++k) gradients.sums[k] = Sum<A>::identity();
    if (channel < layout.channels)
        for_each_in_nhwc_block<(Straight || sizeof(T) == 4 ? 2 : 1)>(layout, channel, rank, gradients);
    if (sums == nullptr) return;
    column_reduce(gradients.sums, scratch);
    if (threadIdx.y != 0 || channel >= layout.channels) return;
#pragma unroll
    for (int k = 0; k < Width; ++k) sums[(channel + k) * layout.blocks + rank] = gradients.sums[k].value;
}

// The gradient of the bias, from the sums of the blocks: a warp for each feature.
//   sums    [features, blocks]
//   dbias   [features]
// Launch: 1-D, a multiple of 32 threads, a thread a lane.
template <typename A>
__global__ void dropout_add_merge(const A* sums, A* dbias, long long features, long long blocks) {
    const long long feature = (blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x) / kWarpThreads;
    if (feature >= features) return;
    Sum<A> total = Sum<A>::identity();
    for (long long rank = threadIdx.x % kWarpThreads; rank < blocks; rank += kWarpThreads)
        total.value += sums[feature * blocks + rank];
    total = warp_reduce(total);
    if (threadIdx.x % kWarpThreads == 0) dbias[feature] = total.value;
}
