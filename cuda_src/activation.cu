// Activations on their own, where no other layer fuses them.
#include "activation.cuh"
#include "elementwise.cuh"

// y = max(x, 0).
//   x, y   [n] T, 16-byte aligned; y may be x
// Launch: 1-D, kElementwiseThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads) relu_forward(const T* x, T* y, long long n) {
    map_elements(x, y, n, [](accumulate_t<T> value) { return Relu::forward(value); });
}

// dx = dy where y is positive (or NaN), else 0.
//   dy, y, dx   [n] T, 16-byte aligned; y is the forward's output
// Launch: 1-D, kElementwiseThreads, any number of blocks.
template <typename T>
__global__ void __launch_bounds__(kElementwiseThreads)
    relu_backward(const T* dy, const T* y, T* dx, long long n) {
    map_element_pairs(dy, y, dx, n, [](accumulate_t<T> gradient, accumulate_t<T> output) {
        return Relu::backward(gradient, output);
    });
}
