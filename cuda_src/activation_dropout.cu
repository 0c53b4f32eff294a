// Activation and dropout in one pass, in either order, forward and backward. The mask is regenerated.
//
// In every kernel:
//   x, y, dy, dx   [n] T, 16-byte aligned; dx may be dy, y is not x
//   activation     its number, see with_activation
//   first          1: dropout before the activation, phi(D(x)); 0: after it, D(phi(x))
//   rule           what drops, and the scale of what is kept; its shift and what dropped elements become are
//   not used seed, offset, rng_state, start   as in dropout.cu; start is any number
// A thread owns eight neighbouring elements, which take two Philox blocks (three where start is no multiple
// of 8), at a time: one byte of bits. Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
#include "activation_dropout.cuh"
#include "gradient_bits.cuh"

// y = D(phi(x)) or phi(D(x)).
//   gradient_bits   [ceil(n / 8)] or null: bit i & 7 of byte i / 8 is set where element i is kept and not <=
//   0: all that
//                   the backward of ReLU needs. Bits beyond n are 0.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads, 4)
    activation_dropout_forward(const T* x, T* y, unsigned char* gradient_bits, long long n, int activation,
                               int first, DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                               unsigned long long offset, const unsigned long long* rng_state,
                               unsigned long long start) {
    using A = accumulate_t<T>;
    constexpr int unroll = kOctetUnroll<T>, width = kPart<T>;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    with_ordered_activation<T>(activation, first != 0, [&](auto phi, auto order) {
        for_each_tile<unroll, kOctet>(n / kOctet * kOctet, [&](const TilePart<unroll, kOctet>& part) {
            OctetDecisions<T, unroll> decisions;
            unsigned int passing[unroll] = {};
#pragma unroll 1
            for (int done = 0; done < kOctet; done += width) {
                Vector<T, width> values[unroll];
                part.load(values, x, done);
                if (done == 0)
                    decisions = OctetDecisions<T, unroll>(rule, part.with_places([&](const auto& places) {
                        return NeighbourWords<kOctet, unroll>::of(stream, start, places);
                    }));
                {
#pragma unroll
                    for (int u = 0; u < unroll; ++u) {
                        A results[width];
#pragma unroll
                        for (int i = 0; i < width; ++i) {
                            const bool is_kept = decisions.keeps(rule, u, done + i);
                            results[i] = forward_element<decltype(phi), decltype(order)::kValue>(
                                widened(values[u], i), is_kept, rule.scale, 1u << (done + i), passing[u]);
                        }
                        values[u] = rounded<T, width>(results);
                    }
                }
                part.store(values, y, done);
            }
            if (gradient_bits != nullptr) store_octet_bits(gradient_bits, passing, part);
        });
    });
    // What is left, less than an octet, a thread each; the first one writes the byte of bits.
    const long long whole = n / kOctet * kOctet, rest = whole + threadIdx.x;
    if (blockIdx.x != 0 || rest >= n) return;
    const unsigned int kept =
        kept_neighbours<kOctet>(rule, stream, start + static_cast<unsigned long long>(whole));
    with_ordered_activation<T>(activation, first != 0, [&](auto phi, auto order) {
        y[rest] = from_accumulate<T>(forward_element<decltype(phi), decltype(order)::kValue>(
            to_accumulate(x[rest]), (kept >> threadIdx.x & 1u) != 0, rule.scale));
    });
    if (gradient_bits == nullptr || threadIdx.x != 0) return;
    unsigned int passing = 0;
#pragma unroll 1
    for (int i = 0; whole + i < n; ++i)
        if (!(to_accumulate(x[whole + i]) <= A(0))) passing |= 1u << i;
    gradient_bits[whole / kOctet] = static_cast<unsigned char>(passing & kept);
}

// dx = scale * phi'(x) * dy, or scale * phi'(scale * x) * dy, where the element is kept, and +0 elsewhere.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads, sizeof(T) == 8 ? 3 : 4)
    activation_dropout_backward(const T* dy, const T* x, T* dx, long long n, int activation, int first,
                                DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                                unsigned long long offset, const unsigned long long* rng_state,
                                unsigned long long start) {
    using A = accumulate_t<T>;
    constexpr int unroll = kOctetUnroll<T>, width = kPart<T>;
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    with_ordered_activation<T>(activation, first != 0, [&](auto phi, auto order) {
        for_each_tile<unroll, kOctet>(n / kOctet * kOctet, [&](const TilePart<unroll, kOctet>& part) {
            OctetDecisions<T, unroll> decisions;
#pragma unroll 1
            for (int done = 0; done < kOctet; done += width) {
                Vector<T, width> gradients[unroll], inputs[unroll];
                part.load(gradients, dy, done);
                part.load(inputs, x, done);
                if (done == 0)
                    decisions = OctetDecisions<T, unroll>(rule, part.with_places([&](const auto& places) {
                        return NeighbourWords<kOctet, unroll>::of(stream, start, places);
                    }));
                {
#pragma unroll
                    for (int u = 0; u < unroll; ++u) {
                        A results[width];
#pragma unroll
                        for (int i = 0; i < width; ++i)
                            results[i] = backward_element<decltype(phi), decltype(order)::kValue>(
                                widened(gradients[u], i), widened(inputs[u], i),
                                decisions.keeps(rule, u, done + i), rule.scale);
                        gradients[u] = rounded<T, width>(results);
                    }
                }
                part.store(gradients, dx, done);
            }
        });
    });
    const long long whole = n / kOctet * kOctet, rest = whole + threadIdx.x;
    if (blockIdx.x != 0 || rest >= n) return;
    const unsigned int kept =
        kept_neighbours<kOctet>(rule, stream, start + static_cast<unsigned long long>(whole));
    with_ordered_activation<T>(activation, first != 0, [&](auto phi, auto order) {
        dx[rest] = from_accumulate<T>(backward_element<decltype(phi), order.kValue>(
            to_accumulate(dy[rest]), to_accumulate(x[rest]), (kept >> threadIdx.x & 1u) != 0, rule.scale));
    });
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
