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
// Blocks that must fit on a multiprocessor at once: 80 registers a thread for the bias and the sums, 128 with
// functions.
template <bool Straight>
constexpr int kBranchBlocks = Straight ? 3 : 2;

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
//   gradient_bits    [ceil(n / 8)] or null: bit i & 7 of byte i / 8 is set where element i is kept and
//                    x + bias is not <= 0. Bits beyond n are 0.
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride); a thread owns eight neighbours.
template <typename T, bool Straight>
__global__ void __launch_bounds__(kElementwiseThreads, kBranchBlocks<Straight>)
    dropout_add_forward(const T* x, const accumulate_t<T>* bias, const T* residual, T* y,
                        unsigned char* gradient_bits, long long n, Divisor64 features, int activation,
                        int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                        unsigned long long offset, const unsigned long long* rng_state,
                        unsigned long long start, DecisionRows rows, const long long* sample_ids) {
    using A = accumulate_t<T>;
    constexpr int unroll = kOctetUnroll<T>, width = kPart<T>;
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
            A branch[unroll][width];
            const auto load_biases = [&] {
#pragma unroll
                for (int u = 0; u < unroll; ++u) {
                    const unsigned long long at =
                        static_cast<unsigned long long>(part.first + part.at(u) + done);
                    load_bias(branch[u], bias, at - features.quotient(at) * features.divisor,
                              features.divisor);
                }
            };
            // Before the words are drawn, where there are registers for both: one wait less.
            if (sizeof(T) == 2) load_biases();
            if (done == 0)
                decisions.draw(rule, [&] {
                    return part.with_positions([&](const auto& places) {
                        if constexpr (Straight)
                            return NeighbourWords<kOctet, unroll>::of(stream, start, places);
                        else
                            return words_in_rows<kOctet>(rule, stream, start, rows, sample_ids, places,
                                                         whole);
                    });
                });
            if (sizeof(T) != 2) load_biases();
            for_each_value(branch, [&](A& z, int u, int i) { z += widened(values[u], i); });
            activate_and_drop<T, Straight>(
                branch, activation, first != 0, rule.scale,
                [&](int u, int i) { return decisions.keeps(rule, u, done + i); }, passing, done);
            for_each_value(branch, [&](A& z, int u, int i) { z += widened(added[u], i); });
#pragma unroll
            for (int u = 0; u < unroll; ++u) values[u] = rounded<T, width>(branch[u]);
            part.store(values, y, done);
        }
        if (gradient_bits != nullptr) store_octet_bits(gradient_bits, passing, part);
    });
    // What is left, less than an octet: by one thread, which writes its byte of bits.
    if (blockIdx.x != 0 || threadIdx.x != 0 || whole == n) return;
    unsigned int passing[1] = {};
#pragma unroll 1
    for (int i = 0; whole + i < n; ++i) {
        const unsigned long long at = static_cast<unsigned long long>(whole + i);
        A branch[1][1] = {
            {to_accumulate(x[at]) +
             (bias == nullptr ? A(-0.0) : bias[at - features.quotient(at) * features.divisor])}};
        const bool is_kept = kept_in_rows<1>(rule, stream, start, rows, sample_ids, at) != 0;
        activate_and_drop<T, Straight>(
            branch, activation, first != 0, rule.scale, [&](int, int) { return is_kept; }, passing, i);
        y[at] = from_accumulate<T>(branch[0][0] + to_accumulate(residual[at]));
    }
    if (gradient_bits != nullptr) gradient_bits[whole / kOctet] = static_cast<unsigned char>(passing[0]);
}

// dx = scale * phi'(z) * dy, or scale * phi'(scale * z) * dy, with z = x + bias, where the element is kept,
// and +0 elsewhere; and the sums of dx, before it is rounded, over the rows of the block.
//   x, bias         null where the gradient does not depend on them: activation is kNoActivation then
//   gradient_bits   what the forward left, for ReLU: says where the gradient passes, instead of the mask; or
//                   null
//   sums            [blocks, features], or null if not requested
//   tiles, blocks   blocks side by side, to cover the features, and those of a tile
//   chunks          of the rows: kBranchRows for each of the threads y
// Launch: 1-D, tiles * blocks; threads x are side by side over features, Width each, threads y take rows in
// turn, kBranchRows each at a time; kChannelThreads together, threads x a power of two, 32 at most.
template <bool Straight>
constexpr int kBranchRows = Straight ? 4 : 2;

template <typename T, int Width, bool Straight>
__global__ void __launch_bounds__(kChannelThreads, kBranchBlocks<Straight>)
    dropout_add_backward(const T* dy, const T* x, const accumulate_t<T>* bias,
                         const unsigned char* gradient_bits, T* dx, accumulate_t<T>* sums, int activation,
                         int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                         unsigned long long offset, const unsigned long long* rng_state,
                         unsigned long long start, DecisionRows decisions, const long long* sample_ids,
                         long long rows, long long features, int tiles, int blocks, int chunks) {
    using A = accumulate_t<T>;
    using Values = Vector<T, Width>;
    // So many are read at once, and so many drawn for.
    constexpr int unroll = kBranchRows<Straight>, drawn_rows = 2;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state, sample_ids != nullptr);
    const int rank = blockIdx.x / tiles;
    const long long feature =
        (static_cast<long long>(blockIdx.x - rank * tiles) * blockDim.x + threadIdx.x) * Width;
    const int chunk_rows = unroll * blockDim.y;
    const int last_rows = static_cast<int>(rows - (chunks - 1ll) * chunk_rows);
    // Lanes without a feature have no row.
    const int row = feature < features ? static_cast<int>(threadIdx.y) : chunk_rows;
    const long long apart = blockDim.y * features;
    long long place = (rank * static_cast<long long>(chunk_rows) + threadIdx.y) * features + feature;
    A totals[Width] = {};
#pragma unroll 1
    for (int chunk = rank; chunk < chunks; chunk += blocks) {
        const int left = chunk == chunks - 1 ? last_rows : chunk_rows;
        Values gradients[unroll], values[unroll];
        long long places[unroll];
        bool has[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            places[u] = place + u * apart;
            has[u] = row + u * static_cast<int>(blockDim.y) < left;
            if (has[u]) gradients[u] = Values::load(dy + places[u]);
            if (!Straight && x != nullptr && has[u]) values[u] = Values::load(x + places[u]);
        }
        place += blocks * (unroll * apart);
        const auto take = [&](int begin, auto keeps) {
#pragma unroll
            for (int u = begin; u < begin + drawn_rows; ++u) {
                if (!has[u]) continue;
                A z[1][Width] = {}, results[1][Width];
                if (!Straight && x != nullptr) {
                    // Each time, from the cache: there are no registers to keep them in.
                    Vector<A, Width> biases;
                    if (bias != nullptr) biases = Vector<A, Width>::load(bias + feature);
                    for_each_value(z, [&](A& value, int, int k) {
                        value = widened(values[u], k) + (bias == nullptr ? A(-0.0) : biases[k]);
                    });
                }
                for_each_value(results, [&](A& dy, int, int k) { dy = widened(gradients[u], k); });
                activation_gradient<T, Straight>(results, z, activation, first != 0, rule.scale,
                                                 [&](int, int k) { return keeps(u, k); });
#pragma unroll
                for (int k = 0; k < Width; ++k) totals[k] += results[0][k];
                rounded<T, Width>(results[0]).store(dx + places[u]);
            }
        };
        if (Straight && (gradient_bits != nullptr || rule.drops_any == 0)) {
            unsigned int bits[unroll];
#pragma unroll
            for (int u = 0; u < unroll; ++u)
                bits[u] = gradient_bits == nullptr || !has[u]
                              ? ~0u
                              : static_cast<unsigned int>(gradient_bits[places[u] / kOctet]) >>
                                    static_cast<int>(places[u] % kOctet);
            for (int begin = 0; begin < unroll; begin += drawn_rows)
                take(begin, [&](int u, int k) { return (bits[u] >> k & 1u) != 0; });
        } else {
#pragma unroll
            for (int begin = 0; begin < unroll; begin += drawn_rows) {
                NeighbourWords<Width, drawn_rows> drawn;
                long long some[drawn_rows];
#pragma unroll
                for (int u = 0; u < drawn_rows; ++u) some[u] = places[begin + u];
                if constexpr (Straight) {
                    drawn = NeighbourWords<Width, drawn_rows>::of(stream, start, some);
                } else {
                    drawn = words_in_rows<Width>(rule, stream, start, decisions, sample_ids, some,
                                                 rows * features);
                    keep_all_if_none_is_dropped(rule, drawn.words);
                }
                take(begin, [&](int u, int k) { return drawn.words[u - begin][k] > rule.last_dropped; });
            }
        }
    }
    if (sums == nullptr) return;
    // Over the rows of a warp, then over the warps.
#pragma unroll 1
    for (int delta = blockDim.x; delta < kWarpThreads; delta *= 2) {
#pragma unroll
        for (int k = 0; k < Width; ++k) totals[k] += __shfl_xor_sync(kFullWarp, totals[k], delta);
    }
    constexpr int warps = kChannelThreads / kWarpThreads;
    __shared__ A of_warps[warps][kRowThreads<Width> * Width];
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    if (thread % kWarpThreads < blockDim.x) {
#pragma unroll
        for (int k = 0; k < Width; ++k) of_warps[thread / kWarpThreads][threadIdx.x * Width + k] = totals[k];
    }
    __syncthreads();
    const long long mine = static_cast<long long>(blockIdx.x - rank * tiles) * blockDim.x * Width + thread;
    if (thread >= blockDim.x * Width || mine >= features) return;
    A total = of_warps[0][thread];
#pragma unroll
    for (int w = 1; w < warps; ++w) total += of_warps[w][thread];
    sums[rank * features + mine] = total;
}

// The gradient of the bias, from the sums of the blocks.
//   sums    [blocks, features]
//   dbias   [features]
// Launch: 1-D, kMergeFeatures * kMergeParts threads, any number of blocks (grid-stride): a feature for each
// of the first number, whose blocks' sums the second number of threads take in turn.
constexpr int kMergeFeatures = 32, kMergeParts = 8;

template <typename A>
__global__ void dropout_add_merge(const A* sums, A* dbias, long long features, int blocks) {
    __shared__ A partials[kMergeParts][kMergeFeatures];
    const int lane = threadIdx.x % kMergeFeatures, part = threadIdx.x / kMergeFeatures;
    for (long long first = blockIdx.x * static_cast<long long>(kMergeFeatures); first < features;
         first += gridDim.x * static_cast<long long>(kMergeFeatures)) {
        const long long feature = first + lane;
        A total(0);
        if (feature < features) {
            for (int rank = part; rank < blocks; rank += kMergeParts)
                total += sums[rank * features + feature];
        }
        partials[part][lane] = total;
        __syncthreads();
        if (part == 0 && feature < features) {
#pragma unroll
            for (int i = 1; i < kMergeParts; ++i) total += partials[i][lane];
            dbias[feature] = total;
        }
        __syncthreads();
    }
}
