// Fractional max pooling (Graham, 2014): windows of one size whose starts are rng_staten, for each plane by
// itself.
//
// All ranks are three-dimensional; a missing depth has size 1. In every kernel:
//   starts   [planes, starts of the outputs along depth, height, width]: first input of each window,
//   ascending taps     [y's shape] number of the tap chosen; at most 256 taps
#include "division64.cuh"
#include "dropout_rule.cuh"
#include "numeric.cuh"

constexpr int kFractionalThreads = 256;

struct FractionalPool {
    Divisor64 input[3], output[3];                          // sizes
    Divisor64 input_plane, output_plane, channels, starts;  // starts: of a plane, along all axes
    int kernel[3];
    int sample_of[3];  // which of a plane's samples is of the axis; unused where there is one output
    int samples;       // of a plane
    int channels_last;
    long long planes;  // samples times channels
};
static_assert(sizeof(FractionalPool) == 280, "the launcher packs it with this size");

// starts, by PyTorch's rule: floor((i + u) * alpha) - floor(u * alpha), and the last one at the end.
//   samples   [planes, pool.samples] u in [0, 1), or null: word number g >> 8, times 2^-24, is number g
//   alpha_0, alpha_1, alpha_2   of the axes: (input - kernel) / (output - 1)
// Launch: 1-D, kFractionalThreads, any number of blocks (grid-stride).
template <typename A>
__global__ void __launch_bounds__(kFractionalThreads)
    fractional_pool_starts(const A* samples, int* starts, A alpha_0, A alpha_1, A alpha_2,
                           unsigned long long seed, unsigned long long offset,
                           const unsigned long long* rng_state, FractionalPool pool) {
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    const unsigned long long total = static_cast<unsigned long long>(pool.planes) * pool.starts.divisor;
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * kFractionalThreads;
    for (unsigned long long n =
             blockIdx.x * static_cast<unsigned long long>(kFractionalThreads) + threadIdx.x;
         n < total; n += step) {
        const unsigned long long plane = pool.starts.quotient(n);
        unsigned long long i = n - plane * pool.starts.divisor;
        int axis = 0;
        if (i >= pool.output[0].divisor) i -= pool.output[0].divisor, axis = 1;
        if (axis == 1 && i >= pool.output[1].divisor) i -= pool.output[1].divisor, axis = 2;
        const unsigned long long outputs = axis == 0   ? pool.output[0].divisor
                                           : axis == 1 ? pool.output[1].divisor
                                                       : pool.output[2].divisor;
        const unsigned long long inputs = axis == 0   ? pool.input[0].divisor
                                          : axis == 1 ? pool.input[1].divisor
                                                      : pool.input[2].divisor;
        const int taps = axis == 0 ? pool.kernel[0] : axis == 1 ? pool.kernel[1] : pool.kernel[2];
        const int last = static_cast<int>(inputs) - taps;
        if (i + 1 == outputs) {
            starts[n] = last;
            continue;
        }
        const int of_axis = axis == 0 ? pool.sample_of[0] : axis == 1 ? pool.sample_of[1] : pool.sample_of[2];
        const unsigned long long g =
            plane * static_cast<unsigned long long>(pool.samples) + static_cast<unsigned long long>(of_axis);
        const A alpha = axis == 0 ? alpha_0 : axis == 1 ? alpha_1 : alpha_2;
        const A u = samples != nullptr ? samples[g]
                                       : A(word_of(stream.block(g >> 2), static_cast<int>(g & 3)) >> 8) *
                                             A(5.9604644775390625e-8);
        const int start = static_cast<int>((A(i) + u) * alpha) - static_cast<int>(u * alpha);
        starts[n] = min(start, last);
    }
}

// Plane and place of an element of an array of inputs or outputs.
struct FractionalPosition {
    unsigned long long plane, place;

    __device__ __forceinline__ FractionalPosition(const FractionalPool& pool, const Divisor64& size,
                                                  unsigned long long n) {
        if (pool.channels_last != 0) {
            const unsigned long long at = pool.channels.quotient(n);
            const unsigned long long sample = size.quotient(at);
            place = at - sample * size.divisor;
            plane = sample * pool.channels.divisor + (n - at * pool.channels.divisor);
        } else {
            plane = size.quotient(n);
            place = n - plane * size.divisor;
        }
    }
};

// First element of a plane in an array whose planes have this size, and the distance of neighbours.
struct FractionalPlane {
    unsigned long long first, step;

    __device__ __forceinline__ FractionalPlane(const FractionalPool& pool, const Divisor64& size,
                                               unsigned long long plane) {
        step = pool.channels_last != 0 ? pool.channels.divisor : 1;
        const unsigned long long sample = pool.channels.quotient(plane);
        first = pool.channels_last != 0
                    ? sample * size.divisor * pool.channels.divisor + plane - sample * pool.channels.divisor
                    : plane * size.divisor;
    }
};

// y = largest value of each window, the first of equal ones, of several NaN the last; and its tap.
//   x, y   [samples, channels, input or output], or with the channels last
// Launch: as fractional_pool_starts; a thread has outputs.
template <typename T>
__global__ void __launch_bounds__(kFractionalThreads)
    fractional_max_pool_forward(const T* x, const int* starts, T* y, unsigned char* argmax,
                                FractionalPool pool) {
    const unsigned long long total = static_cast<unsigned long long>(pool.planes) * pool.output_plane.divisor;
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * kFractionalThreads;
    for (unsigned long long n =
             blockIdx.x * static_cast<unsigned long long>(kFractionalThreads) + threadIdx.x;
         n < total; n += step) {
        const FractionalPosition output(pool, pool.output_plane, n);
        const FractionalPlane inputs(pool, pool.input_plane, output.plane);
        const unsigned long long row = pool.output[2].quotient(output.place);
        const unsigned long long depth = pool.output[1].quotient(row);
        const int* const own = starts + output.plane * pool.starts.divisor;
        const unsigned long long d0 = own[depth];
        const unsigned long long h0 = own[pool.output[0].divisor + row - depth * pool.output[1].divisor];
        const unsigned long long w0 = own[pool.output[0].divisor + pool.output[1].divisor + output.place -
                                          row * pool.output[2].divisor];
        T best = from_accumulate<T>(accumulate_t<T>(0));
        int chosen = 0, tap = 0;
#pragma unroll 1
        for (int d = 0; d < pool.kernel[0]; ++d) {
#pragma unroll 1
            for (int h = 0; h < pool.kernel[1]; ++h) {
                const unsigned long long first =
                    ((d0 + d) * pool.input[1].divisor + h0 + h) * pool.input[2].divisor + w0;
#pragma unroll 1
                for (int w = 0; w < pool.kernel[2]; ++w, ++tap) {
                    const T value = x[inputs.first + (first + w) * inputs.step];
                    const accumulate_t<T> wide = to_accumulate(value);
                    if (tap == 0 || wide > to_accumulate(best) || wide != wide) {
                        best = value;
                        chosen = tap;
                    }
                }
            }
        }
        y[n] = best;
        argmax[n] = static_cast<unsigned char>(chosen);
    }
}

// Windows over an input along one axis: outputs first .. end - 1.
struct FractionalCover {
    int first, end;

    //   starts   [outputs], ascending
    __device__ __forceinline__ FractionalCover(const int* starts, int outputs, int kernel, int at) {
        int low = 0, high = outputs;
#pragma unroll 1
        while (low < high) {
            const int middle = (low + high) / 2;
            if (starts[middle] + kernel <= at) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        first = end = low;
#pragma unroll 1
        while (end < outputs && starts[end] <= at) ++end;
    }
};

// dx = sum of the gradients of the windows that chose the element, in the order of the outputs.
//   dy, argmax   y's shape
//   dx         x's shape: every element is written once
// Launch: as fractional_pool_starts; a thread has inputs.
template <typename T>
__global__ void __launch_bounds__(kFractionalThreads)
    fractional_max_pool_backward(const T* dy, const unsigned char* argmax, const int* starts, T* dx,
                                 FractionalPool pool) {
    using A = accumulate_t<T>;
    const unsigned long long total = static_cast<unsigned long long>(pool.planes) * pool.input_plane.divisor;
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * kFractionalThreads;
    for (unsigned long long n =
             blockIdx.x * static_cast<unsigned long long>(kFractionalThreads) + threadIdx.x;
         n < total; n += step) {
        const FractionalPosition input(pool, pool.input_plane, n);
        const FractionalPlane outputs(pool, pool.output_plane, input.plane);
        const unsigned long long row = pool.input[2].quotient(input.place);
        const unsigned long long depth = pool.input[1].quotient(row);
        const int at_d = static_cast<int>(depth);
        const int at_h = static_cast<int>(row - depth * pool.input[1].divisor);
        const int at_w = static_cast<int>(input.place - row * pool.input[2].divisor);
        const int* const starts_d = starts + input.plane * pool.starts.divisor;
        const int* const starts_h = starts_d + pool.output[0].divisor;
        const int* const starts_w = starts_h + pool.output[1].divisor;
        const FractionalCover over_d(starts_d, static_cast<int>(pool.output[0].divisor), pool.kernel[0],
                                     at_d);
        const FractionalCover over_h(starts_h, static_cast<int>(pool.output[1].divisor), pool.kernel[1],
                                     at_h);
        const FractionalCover over_w(starts_w, static_cast<int>(pool.output[2].divisor), pool.kernel[2],
                                     at_w);
        A sum = A(0);
#pragma unroll 1
        for (int d = over_d.first; d < over_d.end; ++d) {
#pragma unroll 1
            for (int h = over_h.first; h < over_h.end; ++h) {
                const int before =
                    ((at_d - starts_d[d]) * pool.kernel[1] + at_h - starts_h[h]) * pool.kernel[2] + at_w;
                const unsigned long long first =
                    (d * pool.output[1].divisor + static_cast<unsigned long long>(h)) *
                    pool.output[2].divisor;
#pragma unroll 1
                for (int w = over_w.first; w < over_w.end; ++w) {
                    const unsigned long long place = outputs.first + (first + w) * outputs.step;
                    if (argmax[place] == before - starts_w[w]) sum += to_accumulate(dy[place]);
                }
            }
        }
        dx[n] = from_accumulate<T>(sum);
    }
}
