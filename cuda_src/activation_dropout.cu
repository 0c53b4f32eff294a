// Activation and dropout in one pass, in either order, forward and backward. The mask is regenerated.
//
// In every kernel:
//   x, y, dy, dx   [n] T, 16-byte aligned; y may be x, dx may be dy
//   activation     its number, see with_activation
//   first          1: dropout before the activation, phi(D(x)); 0: after it, D(phi(x))
//   rule           what drops, and the scale of what is kept; its shift and what dropped elements become are
//                  not used
//   seed, offset, rng_state, start   as in dropout.cu; start is any number
// A thread owns octets of neighbouring elements, which take two Philox blocks each (three where start is no
// multiple of 8). Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
#include "activation_dropout.cuh"
#include "channels_last.cuh"
#include "gradient_bits.cuh"

// y = D(phi(x)) or phi(D(x)).
//   gradient_bits   [ceil(n / 8)] or null: bit i & 7 of byte i / 8 is set where element i is kept and not
//                   <= 0: all that the backward of ReLU needs. Bits beyond n are 0.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads, 3)
    activation_dropout_forward(const T* x, T* y, unsigned char* gradient_bits, long long n, int activation,
                               int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                               unsigned long long offset, const unsigned long long* rng_state,
                               unsigned long long start) {
    using A = accumulate_t<T>;
    // Octets whose words are drawn together, which share the steps of the key; of double one at all.
    constexpr int pair = kOctetUnroll<T>, unroll = sizeof(T) == 8 ? 1 : 2 * pair;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    const long long whole = n / kOctet * kOctet;
    with_or_without_dropping(rule, [&](auto drops) {
        for_each_tile<unroll, kOctet>(whole, [&](const TilePart<unroll, kOctet>& part) {
            unsigned int passing[unroll] = {};
            Vector<T, kOctet> values[unroll];
            part.load(values, x);
#pragma unroll
            for (int begin = 0; begin < unroll; begin += pair) {
                OctetDecisions<T, pair, decltype(drops)::value> decisions;
                decisions.draw(rule, [&] {
                    long long places[pair];
#pragma unroll
                    for (int u = 0; u < pair; ++u) places[u] = part.first + part.at(begin + u);
                    return NeighbourWords<kOctet, pair>::of(stream, start, places);
                });
                A results[pair][kOctet];
                unsigned int bits[pair] = {};
                for_each_value(results,
                               [&](A& result, int u, int i) { result = widened(values[begin + u], i); });
                activate_and_drop<T>(
                    results, activation, first != 0, rule.scale,
                    [&](int u, int i) { return decisions.keeps(rule, u, i); }, bits, 0);
#pragma unroll
                for (int u = 0; u < pair; ++u) {
                    values[begin + u] = rounded<T, kOctet>(results[u]);
                    passing[begin + u] = bits[u];
                }
            }
            part.store(values, y);
            if (gradient_bits != nullptr) store_octet_bits(gradient_bits, passing, part);
        });
    });
    // What is left, less than an octet, a thread each; the first one writes the byte of all their bits.
    const long long rest = whole + threadIdx.x;
    if (blockIdx.x != 0 || rest >= n) return;
    const unsigned int kept =
        kept_neighbours<kOctet>(rule, stream, start + static_cast<unsigned long long>(whole));
    A result[1][1] = {{to_accumulate(x[rest])}};
    unsigned int passing[1] = {};
    activate_and_drop<T>(
        result, activation, first != 0, rule.scale, [&](int, int) { return (kept >> threadIdx.x & 1u) != 0; },
        passing, 0);
    y[rest] = from_accumulate<T>(result[0][0]);
    if (gradient_bits == nullptr) return;
    const unsigned int lanes = (1u << static_cast<int>(n - whole)) - 1u;
    const unsigned int bits = __ballot_sync(lanes, passing[0] != 0);
    if (threadIdx.x == 0) gradient_bits[whole / kOctet] = static_cast<unsigned char>(bits);
}

// dx = scale * phi'(x) * dy, or scale * phi'(scale * x) * dy, where the element is kept, and +0 elsewhere.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads, sizeof(T) == 4 ? 4 : 3)
    activation_dropout_backward(const T* dy, const T* x, T* dx, long long n, int activation, int first,
                                DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                                unsigned long long offset, const unsigned long long* rng_state,
                                unsigned long long start) {
    using A = accumulate_t<T>;
    constexpr int unroll = kOctetUnroll<T>, width = kPart<T>;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    const long long whole = n / kOctet * kOctet;
    with_or_without_dropping(rule, [&](auto drops) {
        for_each_tile<unroll, kOctet>(whole, [&](const TilePart<unroll, kOctet>& part) {
            OctetDecisions<T, unroll, decltype(drops)::value> decisions;
#pragma unroll 1
            for (int done = 0; done < kOctet; done += width) {
                Vector<T, width> gradients[unroll], inputs[unroll];
                part.load(gradients, dy, done);
                part.load(inputs, x, done);
                if (done == 0)
                    decisions.draw(rule, [&] {
                        return part.with_positions([&](const auto& places) {
                            return NeighbourWords<kOctet, unroll>::of(stream, start, places);
                        });
                    });
                A results[unroll][width], at[unroll][width];
                for_each_value(results, [&](A& value, int u, int i) { value = widened(gradients[u], i); });
                for_each_value(at, [&](A& value, int u, int i) { value = widened(inputs[u], i); });
                activation_gradient<T>(results, at, activation, first != 0, rule.scale,
                                       [&](int u, int i) { return decisions.keeps(rule, u, done + i); });
#pragma unroll
                for (int u = 0; u < unroll; ++u) gradients[u] = rounded<T, width>(results[u]);
                part.store(gradients, dx, done);
            }
        });
    });
    const long long rest = whole + threadIdx.x;
    if (blockIdx.x != 0 || rest >= n) return;
    const unsigned int kept =
        kept_neighbours<kOctet>(rule, stream, start + static_cast<unsigned long long>(whole));
    A result[1][1] = {{to_accumulate(dy[rest])}}, at[1][1] = {{to_accumulate(x[rest])}};
    activation_gradient<T>(result, at, activation, first != 0, rule.scale,
                           [&](int, int) { return (kept >> threadIdx.x & 1u) != 0; });
    dx[rest] = from_accumulate<T>(result[0][0]);
}

// As the forward, without bits, of an array whose channels lie side by side.
//   Width   neighbouring channels of a thread
template <typename T, int Width>
__global__ void __launch_bounds__(kElementwiseThreads, 3)
    activation_dropout_forward_last(const T* x, T* y, ChannelsLast array, int activation, int first,
                                    DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                                    unsigned long long offset, const unsigned long long* rng_state,
                                    unsigned long long start) {
    using A = accumulate_t<T>;
    // Positions that are calculated together: values of as many octets as above.
    constexpr int together = kPositionsOf<kOctetUnroll<T> * kOctet, Width>;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    for (long long number = first_of_thread(); number < array.parts; number += step_of_threads()) {
        LastPart<Width> part(array, number);
        part.decide(rule, stream, start);
        Vector<T, Width> values[kPositions];
        part.load(values, x);
#pragma unroll
        for (int begin = 0; begin < kPositions; begin += together) {
            A results[together][Width];
            unsigned int passing[together] = {};
            for_each_value(results, [&](A& result, int i, int j) { result = widened(values[begin + i], j); });
            activate_and_drop<T>(
                results, activation, first != 0, rule.scale,
                [&](int i, int j) { return part.keeps(begin + i, j); }, passing, 0);
#pragma unroll
            for (int i = 0; i < together; ++i) values[begin + i] = rounded<T, Width>(results[i]);
        }
        part.store(values, y);
    }
}

// As the backward, likewise.
template <typename T, int Width>
__global__ void __launch_bounds__(kElementwiseThreads, 3)
    activation_dropout_backward_last(const T* dy, const T* x, T* dx, ChannelsLast array, int activation,
                                     int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                                     unsigned long long offset, const unsigned long long* rng_state,
                                     unsigned long long start) {
    using A = accumulate_t<T>;
    constexpr int together = kPositionsOf<kOctetUnroll<T> * kPart<T>, Width>;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    for (long long number = first_of_thread(); number < array.parts; number += step_of_threads()) {
        LastPart<Width> part(array, number);
        part.decide(rule, stream, start);
#pragma unroll 1
        for (int begin = 0; begin < part.count; begin += together) {
            Vector<T, Width> gradients[together], inputs[together];
            part.load(gradients, dy, begin);
            part.load(inputs, x, begin);
            A results[together][Width], at[together][Width];
            for_each_value(results, [&](A& value, int i, int j) { value = widened(gradients[i], j); });
            for_each_value(at, [&](A& value, int i, int j) { value = widened(inputs[i], j); });
            activation_gradient<T>(results, at, activation, first != 0, rule.scale,
                                   [&](int i, int j) { return part.keeps(begin + i, j); });
#pragma unroll
            for (int i = 0; i < together; ++i) gradients[i] = rounded<T, Width>(results[i]);
            part.store(gradients, dx, begin);
        }
    }
}

// dx = scale * dy where the forward set the element's bit, and +0 elsewhere: ReLU, with either order of
// dropout.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    relu_dropout_backward(const T* dy, const unsigned char* gradient_bits, T* dx, long long n,
                          accumulate_t<T> scale) {
    map_passing(dy, gradient_bits, dx, n,
                [&](T gradient) { return from_accumulate<T>(to_accumulate(gradient) * scale); });
}
