// ReLU on its own, where no other layer fuses it.
#include "activation.cuh"
#include "gradient_bits.cuh"

// y = max(x, 0).
//   x, y            [n] T, 16-byte aligned; y may be x
//   gradient_bits   [ceil(n / 8)], see gradient_bits.cuh: set where x is positive (or NaN)
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    relu_forward(const T* x, T* y, unsigned char* gradient_bits, long long n) {
    using A = accumulate_t<T>;
    const long long octets = n / kOctet;
    for_each_tile<kPassingUnroll<T>, kVectorWidth<T>>(octets * kOctet, [&](const PassingPart<T>& part) {
        Vector<T> values[kPassingUnroll<T>];
        unsigned int bits[kPassingUnroll<T>] = {};
        part.load(values, x);
#pragma unroll
        for (int u = 0; u < kPassingUnroll<T>; ++u) {
#pragma unroll
            for (int i = 0; i < kVectorWidth<T>; ++i) {
                const A value = widened(values[u], i);
                if (!(value <= A(0))) bits[u] |= 1u << i;
                values[u][i] = from_accumulate<T>(Relu::forward(value));
            }
        }
        part.store(values, y);
        store_passing_bits<T>(gradient_bits, bits, part);
    });
    // What is left is one thread's, which reads before it writes: y may be x.
    if (blockIdx.x != 0 || threadIdx.x != 0 || octets * kOctet == n) return;
    unsigned int bits = 0;
#pragma unroll 1
    for (long long i = octets * kOctet; i < n; ++i) {
        const A value = to_accumulate(x[i]);
        if (!(value <= A(0))) bits |= 1u << (i % kOctet);
        y[i] = from_accumulate<T>(Relu::forward(value));
    }
    gradient_bits[octets] = static_cast<unsigned char>(bits);
}

// dx = dy where the input was positive (or NaN), else +0.
//   dy, dx          [n] T, 16-byte aligned; dx may be dy
//   gradient_bits   [ceil(n / 8)], the forward's
// Launch: 1-D, kElementwiseThreads, any number of blocks (grid-stride).
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    relu_backward(const T* dy, const unsigned char* gradient_bits, T* dx, long long n) {
    map_passing(dy, gradient_bits, dx, n, [](T gradient) { return gradient; });
}
