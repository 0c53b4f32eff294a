// Fractional max pooling (Graham, 2014): windows of one size whose starts are drawn, for each plane by
// itself.
//
// All ranks are three-dimensional; a missing depth has size 1. In every kernel:
//   starts   [planes, starts of the outputs along depth, height, width]: first input of each window,
//   ascending argmax   [y's shape] number of the tap chosen; at most 256 taps
//
// A block has boxes of some planes at a time, of outputs or of inputs. It keeps the starts of those planes at
// hand: each is asked for many times.
#include "dropout_rule.cuh"
#include "fast_division.cuh"
#include "pool_box.cuh"

constexpr int kFractionalThreads = 256;
constexpr int kFractionalStarts = 4096;  // that a block keeps
constexpr int kFractionalAtOnce = 4;     // taps that are asked for at a time

struct FractionalPool {
    PoolBoxes boxes;
    Divisor64 starts;  // of a plane, along all axes
    Divisor32 by_starts, by_kernel[3];
    int input[3], output[3];
    int kernel[3];
    int sample_of[3];  // which of a plane's samples is of the axis; unused where there is one output
    int samples;       // of a plane
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
    const unsigned long long total =
        static_cast<unsigned long long>(pool.boxes.images * pool.boxes.channels) * pool.starts.divisor;
    const unsigned long long step = static_cast<unsigned long long>(gridDim.x) * kFractionalThreads;
    for (unsigned long long n =
             blockIdx.x * static_cast<unsigned long long>(kFractionalThreads) + threadIdx.x;
         n < total; n += step) {
        const unsigned long long plane = pool.starts.quotient(n);
        int i = static_cast<int>(n - plane * pool.starts.divisor);
        int axis = 0;
        if (i >= pool.output[0]) i -= pool.output[0], axis = 1;
        if (axis == 1 && i >= pool.output[1]) i -= pool.output[1], axis = 2;
        const int outputs = axis == 0 ? pool.output[0] : axis == 1 ? pool.output[1] : pool.output[2];
        const int inputs = axis == 0 ? pool.input[0] : axis == 1 ? pool.input[1] : pool.input[2];
        const int taps = axis == 0 ? pool.kernel[0] : axis == 1 ? pool.kernel[1] : pool.kernel[2];
        const int last = inputs - taps;
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

// Starts of the windows of one plane along one axis.
struct FractionalStarts {
    const int* first;
    int step, outputs, kernel;

    __device__ __forceinline__ int operator[](int i) const { return first[i * step]; }

    // Windows over a range of places.
    __device__ __forceinline__ int first_over(int from) const {
        return from == 0 ? 0 : first_beyond(from, kernel);
    }
    __device__ __forceinline__ int end_over(int to, int size) const {
        return to == size ? outputs : first_beyond(to, 1);
    }
    // The first window that begins less than `taps` before a place.
    __device__ __forceinline__ int first_beyond(int place, int taps) const {
        int low = 0, high = outputs;
#pragma unroll 1
        while (low < high) {
            const int middle = (low + high) / 2;
            if ((*this)[middle] + taps <= place) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }
    // More windows over a place, on both sides of some that are.
    __device__ __forceinline__ void widen(int place, int& low, int& high) const {
#pragma unroll 1
        while (low > 0 && (*this)[low - 1] + kernel > place) --low;
#pragma unroll 1
        while (high + 1 < outputs && (*this)[high + 1] <= place) ++high;
    }
};

// Those of the thread's plane, after all threads have brought those of all planes of the block.
//   kept   [kFractionalStarts] in shared memory
// All threads of the block must call it.
struct FractionalPlane {
    const int* first;
    int step;

    __device__ __forceinline__ FractionalPlane(const FractionalPool& pool, const PoolBox& box,
                                               const int* starts, int* kept) {
        const int count = static_cast<int>(pool.starts.divisor);
        // One more for channels last, so that neighbours of an axis are in different banks.
        const int apart = (1 << pool.boxes.log2_group) + 1;
        const bool last = pool.boxes.channels_last != 0;
        first = starts + (box.image * pool.boxes.channels + box.first) * count;
        step = 1;
        if (count <= kFractionalStarts / apart ||
            (!last && count <= kFractionalStarts >> pool.boxes.log2_group)) {
#pragma unroll 4
            for (int n = threadIdx.x; n < box.planes * count; n += kFractionalThreads) {
                const int plane = pool.by_starts.quotient(n);
                kept[last ? (n - plane * count) * apart + plane : n] = first[n];
            }
            __syncthreads();
            first = kept;
            if (last) {
                first += box.own;
                step = apart;
                return;
            }
        }
        first += static_cast<long long>(box.own) * count;
    }
    __device__ __forceinline__ FractionalStarts along(const FractionalPool& pool, int axis) const {
        const int before = axis == 0 ? 0 : axis == 1 ? pool.output[0] : pool.output[0] + pool.output[1];
        return FractionalStarts{first + before * step, step, pool.output[axis], pool.kernel[axis]};
    }
};

// y = largest value of each window, the first of equal ones, of several NaN the last; and its tap.
//   x, y   [samples, channels, input or output], or with the channels last
// Launch: 1-D, kFractionalThreads, any number of blocks (grid-stride); a block has boxes of outputs.
template <typename T, typename Index>
__global__ void __launch_bounds__(kFractionalThreads, kBoxBlocks<Index>)
    fractional_max_pool_forward(const T* x, const int* starts, T* y, unsigned char* argmax,
                                FractionalPool pool) {
    __shared__ int kept[kFractionalStarts];
    const Index step = pool.boxes.channels_last != 0 ? static_cast<Index>(pool.boxes.channels) : 1;
    const int taps = pool.kernel[0] * pool.kernel[1] * pool.kernel[2];
    for (unsigned long long number = blockIdx.x; number < pool.boxes.number; number += gridDim.x) {
        const PoolBox box(pool.boxes, number);
        const FractionalPlane plane(pool, box, starts, kept);
        const FractionalStarts over_d = plane.along(pool, 0), over_h = plane.along(pool, 1),
                               over_w = plane.along(pool, 2);
        const int rows = box.own < box.planes ? box.to[1] - box.from[1] : 0;
        const T* const source = x + box.before(pool.boxes, pool.input, box.own);
        const long long before = box.before(pool.boxes, pool.output, box.own);
#pragma unroll 1
        for (int d = box.from[0]; d < box.to[0]; ++d) {
            PoolWalk walk(box.to[2] - box.from[2], box.worker, box.workers);
#pragma unroll 1
            for (; walk.row < rows; walk.next()) {
                const int h = box.from[1] + walk.row, w = box.from[2] + walk.column;
                const T* const corner =
                    source + place_of<Index>(pool.input, over_d[d], over_h[h], over_w[w]) * step;
                T best = from_accumulate<T>(accumulate_t<T>(0));
                int chosen = 0, at_d = 0, at_h = 0, at_w = 0;
#pragma unroll 1
                for (int tap = 0; tap < taps; tap += kFractionalAtOnce) {
                    T value[kFractionalAtOnce];
#pragma unroll
                    for (int u = 0; u < kFractionalAtOnce; ++u) {
                        if (tap + u < taps)
                            value[u] = corner[place_of<Index>(pool.input, at_d, at_h, at_w) * step];
                        if (++at_w == pool.kernel[2]) at_w = 0, ++at_h;
                        if (at_h == pool.kernel[1]) at_h = 0, ++at_d;
                    }
#pragma unroll
                    for (int u = 0; u < kFractionalAtOnce; ++u) {
                        if (tap + u >= taps) break;
                        const accumulate_t<T> wide = to_accumulate(value[u]);
                        if (tap + u == 0 || wide > to_accumulate(best) || wide != wide) {
                            best = value[u];
                            chosen = tap + u;
                        }
                    }
                }
                const Index i = place_of<Index>(pool.output, d, h, w) * step;
                y[before + i] = best;
                argmax[before + i] = static_cast<unsigned char>(chosen);
            }
        }
        __syncthreads();
    }
}

// dx = sum of the gradients of the windows that chose the element, in the order of the outputs.
//   dy       y's shape
//   dx       x's shape: every element is written once
// Of the windows that chose an element the first adds up the gradients of all.
// Launch: as fractional_max_pool_forward; a block has boxes of inputs, of kBoxBytes at most.
template <typename T, typename Index>
__global__ void __launch_bounds__(kFractionalThreads, kBoxBlocks<Index>)
    fractional_max_pool_backward(const T* dy, const unsigned char* argmax, const int* starts, T* dx,
                                 FractionalPool pool) {
    using A = accumulate_t<T>;
    __shared__ int kept[kFractionalStarts];
    __shared__ uint4 words[kBoxBytes / sizeof(uint4)];
    T* const made = reinterpret_cast<T*>(words);
    const Index step = pool.boxes.channels_last != 0 ? static_cast<Index>(pool.boxes.channels) : 1;
    for (unsigned long long number = blockIdx.x; number < pool.boxes.number; number += gridDim.x) {
        const PoolBox box(pool.boxes, number);
        clear_box<T>(pool.boxes, box, words);
        const FractionalPlane plane(pool, box, starts, kept);
        __syncthreads();
        if (box.own < box.planes) {
            const FractionalStarts over_d = plane.along(pool, 0), over_h = plane.along(pool, 1),
                                   over_w = plane.along(pool, 2);
            const int begin_d = over_d.first_over(box.from[0]),
                      end_d = over_d.end_over(box.to[0], pool.input[0]);
            const int begin_h = over_h.first_over(box.from[1]),
                      end_h = over_h.end_over(box.to[1], pool.input[1]);
            const int begin_w = over_w.first_over(box.from[2]),
                      end_w = over_w.end_over(box.to[2], pool.input[2]);
            const long long before = box.before(pool.boxes, pool.output, box.own);
            const auto take = [&](int d, int h, int w, int tap, T gradient) {
                const int tap_row = pool.by_kernel[2].quotient(tap);
                const int tap_d = pool.by_kernel[1].quotient(tap_row);
                const int at_d = over_d[d] + tap_d, at_h = over_h[h] + tap_row - tap_d * pool.kernel[1];
                const int at_w = over_w[w] + tap - tap_row * pool.kernel[2];
                if (at_d < box.from[0] || at_d >= box.to[0] || at_h < box.from[1] || at_h >= box.to[1] ||
                    at_w < box.from[2] || at_w >= box.to[2])
                    return;
                // Windows over the element.
                int low_d = d, high_d = d, low_h = h, high_h = h, low_w = w, high_w = w;
                over_d.widen(at_d, low_d, high_d);
                over_h.widen(at_h, low_h, high_h);
                over_w.widen(at_w, low_w, high_w);
                A sum = A(0);
                if (low_d == high_d && low_h == high_h && low_w == high_w) {
                    sum += to_accumulate(gradient);
                } else {
                    const Index own = place_of<Index>(pool.output, d, h, w);
#pragma unroll 1
                    for (int other_d = low_d; other_d <= high_d; ++other_d) {
#pragma unroll 1
                        for (int other_h = low_h; other_h <= high_h; ++other_h) {
                            const int tap_before =
                                ((at_d - over_d[other_d]) * pool.kernel[1] + at_h - over_h[other_h]) *
                                    pool.kernel[2] +
                                at_w;
                            Index other = place_of<Index>(pool.output, other_d, other_h, low_w);
#pragma unroll 1
                            for (int other_w = low_w; other_w <= high_w; ++other_w, ++other) {
                                if (argmax[before + other * step] != tap_before - over_w[other_w]) continue;
                                if (other < own) return;
                                sum += to_accumulate(dy[before + other * step]);
                            }
                        }
                    }
                }
                made[PlaneInBox(pool.boxes, box).place(box, at_d, at_h, at_w)] = from_accumulate<T>(sum);
            };
#pragma unroll 1
            for (int d = begin_d; d < end_d; ++d) {
                PoolWalk walk(max(end_w - begin_w, 1), box.worker, box.workers);
                const int end_row = begin_w < end_w ? end_h : 0;
                walk.row += begin_h;
                int tap;
                T gradient;
                const auto ask = [&] {
                    if (walk.row >= end_row) return;
                    const Index i = place_of<Index>(pool.output, d, walk.row, begin_w + walk.column) * step;
                    tap = argmax[before + i];
                    gradient = dy[before + i];
                };
                ask();
#pragma unroll 1
                while (walk.row < end_row) {
                    const int h = walk.row, w = begin_w + walk.column, own_tap = tap;
                    const T own_gradient = gradient;
                    walk.next();
                    // The next is on its way meanwhile.
                    ask();
                    take(d, h, w, own_tap, own_gradient);
                }
            }
        }
        __syncthreads();
        write_box(pool.boxes, box, made, dx);
        __syncthreads();
    }
}
