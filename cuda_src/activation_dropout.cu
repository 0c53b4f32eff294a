// Activation and dropout in one pass, in either order, forward and backward. The mask is regenerated.
//
// In every kernel:
//   x, y, dy, dx   [n] T, 16-byte aligned; dx may be dy, y is not x
//   activation     its number, see with_activation
//   first          1: dropout before the activation, phi(D(x)); 0: after it, D(phi(x))
//   rule           what drops, and the scale of what is kept; its shift and what dropped elements become are
//   not used seed, offset, rng_state, start   as in dropout.cu; start is any number
// A thread owns eight neighbouring elements: two Philox blocks (three where start is no multiple of 4), one
// byte of bits. Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
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
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    const bool is_first = first != 0;
    const long long octets = n / kOctet;
    const long long step = static_cast<long long>(gridDim.x) * kElementwiseThreads;
    for (long long octet = blockIdx.x * static_cast<long long>(kElementwiseThreads) + threadIdx.x;
         octet < octets; octet += step) {
        const long long base = octet * kOctet;
        Vector<T, kPart<T>> values = Vector<T, kPart<T>>::load(x + base);
        const unsigned int kept =
            kept_neighbours<kOctet>(rule, stream, start + static_cast<unsigned long long>(base));
        unsigned int not_clipped = 0;
        with_activation<T>(activation, [&](auto phi) {
            using Phi = decltype(phi);
#pragma unroll 1
            for (int part = 0; part < kOctet; part += kPart<T>) {
                if (part != 0) values = Vector<T, kPart<T>>::load(x + base + part);
#pragma unroll
                for (int i = 0; i < kPart<T>; ++i) {
                    const A value = to_accumulate(values[i]);
                    if (Phi::kGradientIsBit && !(value <= A(0))) not_clipped |= 1u << (part + i);
                    const bool is_kept = kept >> (part + i) & 1u;
                    values[i] =
                        from_accumulate<T>(forward_element<Phi>(value, is_kept, is_first, rule.scale));
                }
                values.store(y + base + part);
            }
        });
        if (gradient_bits != nullptr) gradient_bits[octet] = static_cast<unsigned char>(not_clipped & kept);
    }
    const long long base = octets * kOctet, rest = base + threadIdx.x;
    if (blockIdx.x != 0 || rest >= n) return;
    const unsigned int kept =
        kept_neighbours<kOctet>(rule, stream, start + static_cast<unsigned long long>(base));
    with_activation<T>(activation, [&](auto phi) {
        const bool is_kept = kept >> threadIdx.x & 1u;
        const A value = to_accumulate(x[rest]);
        y[rest] = from_accumulate<T>(forward_element<decltype(phi)>(value, is_kept, is_first, rule.scale));
    });
    if (gradient_bits == nullptr || threadIdx.x != 0) return;
    unsigned int not_clipped = 0;
#pragma unroll 1
    for (int i = 0; base + i < n; ++i)
        if (!(to_accumulate(x[base + i]) <= A(0))) not_clipped |= 1u << i;
    gradient_bits[octets] = static_cast<unsigned char>(not_clipped & kept);
}

// dx = scale * phi'(x) * dy, or scale * phi'(scale * x) * dy, where the element is kept, and +0 elsewhere.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads, sizeof(T) == 8 ? 3 : 4)
    activation_dropout_backward(const T* dy, const T* x, T* dx, long long n, int activation, int first,
                                DropoutRule<accumulate_t<T>> rule, unsigned long long seed,
                                unsigned long long offset, const unsigned long long* rng_state,
                                unsigned long long start) {
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    const bool is_first = first != 0;
    const long long octets = n / kOctet;
    const long long step = static_cast<long long>(gridDim.x) * kElementwiseThreads;
    for (long long octet = blockIdx.x * static_cast<long long>(kElementwiseThreads) + threadIdx.x;
         octet < octets; octet += step) {
        const long long base = octet * kOctet;
        Vector<T, kPart<T>> gradients = Vector<T, kPart<T>>::load(dy + base);
        Vector<T, kPart<T>> inputs = Vector<T, kPart<T>>::load(x + base);
        const unsigned int kept =
            kept_neighbours<kOctet>(rule, stream, start + static_cast<unsigned long long>(base));
        with_activation<T>(activation, [&](auto phi) {
#pragma unroll 1
            for (int part = 0; part < kOctet; part += kPart<T>) {
                if (part != 0) {
                    gradients = Vector<T, kPart<T>>::load(dy + base + part);
                    inputs = Vector<T, kPart<T>>::load(x + base + part);
                }
#pragma unroll
                for (int i = 0; i < kPart<T>; ++i)
                    gradients[i] = from_accumulate<T>(
                        backward_element<decltype(phi)>(to_accumulate(gradients[i]), to_accumulate(inputs[i]),
                                                        kept >> (part + i) & 1u, is_first, rule.scale));
                gradients.store(dx + base + part);
            }
        });
    }
    const long long base = octets * kOctet, rest = base + threadIdx.x;
    if (blockIdx.x != 0 || rest >= n) return;
    const unsigned int kept =
        kept_neighbours<kOctet>(rule, stream, start + static_cast<unsigned long long>(base));
    with_activation<T>(activation, [&](auto phi) {
        dx[rest] = from_accumulate<T>(backward_element<decltype(phi)>(
            to_accumulate(dy[rest]), to_accumulate(x[rest]), kept >> threadIdx.x & 1u, is_first, rule.scale));
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
