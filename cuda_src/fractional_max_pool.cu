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

template <bool Value>
struct Is {
    static constexpr bool value = Value;
};

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
    int step;

    __device__ __forceinline__ int operator[](int i) const { return first[i * step]; }
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
        return FractionalStarts{first + before * step, step};
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

// A window along one axis: where it begins, and which of its taps, begin .. end - 1, are under it alone.
struct alignas(8) FractionalWindow {
    int start;
    unsigned short begin, end;

    //   starts   of the axis
    __device__ __forceinline__ FractionalWindow(const int* starts, int i, int outputs, int kernel)
        : start(starts[i]) {
        const int before = i == 0 ? start - kernel : starts[i - 1];
        const int after = i + 1 == outputs ? start + kernel : starts[i + 1];
        begin = static_cast<unsigned short>(max(before + kernel - start, 0));
        end = static_cast<unsigned short>(min(after - start, kernel));
    }
    __device__ __forceinline__ bool has_alone(int tap) const { return tap >= begin && tap < end; }
};

// The windows of one plane along one axis.
//   Kept   windows, `step` apart, in shared memory; else they are made of their starts
template <bool Kept>
struct FractionalWindows {
    const FractionalWindow* windows;
    const int* starts;
    int step, outputs, kernel;

    __device__ __forceinline__ FractionalWindow operator[](int i) const {
        if constexpr (Kept) {
            return windows[i * step];
        } else {
            return FractionalWindow(starts, i, outputs, kernel);
        }
    }
    __device__ __forceinline__ int start(int i) const {
        if constexpr (Kept) {
            return windows[i * step].start;
        } else {
            return starts[i];
        }
    }

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
            if (start(middle) + taps <= place) {
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
        while (low > 0 && start(low - 1) + kernel > place) --low;
#pragma unroll 1
        while (high + 1 < outputs && start(high + 1) <= place) ++high;
    }
};

// The gradients of the elements of a box, of the thread's plane.
//   before   the plane, in dy and argmax
//   made     the box
template <typename T, typename Index, bool Kept>
struct ScatterInBox {
    using A = accumulate_t<T>;
    const T* dy;
    const unsigned char* argmax;
    T* made;
    const FractionalPool& pool;
    const PoolBox& box;
    const FractionalWindows<Kept> (&over)[3];
    Index step;
    PlaneInBox plane;

    __device__ __forceinline__ Index place(int d, int h, int w) const {
        return place_of<Index>(pool.output, d, h, w) * step;
    }

    // What a window chose, and whether no other one may have chosen it.
    struct Chosen {
        int at[3];
        bool is_inside, is_alone;
    };
    __device__ __forceinline__ Chosen chosen(const FractionalWindow& of_d, int h, int w, int tap) const {
        const FractionalWindow of_h = over[1][h], of_w = over[2][w];
        const int tap_row = pool.by_kernel[2].quotient(tap);
        const int tap_d = pool.kernel[0] == 1 ? 0 : pool.by_kernel[1].quotient(tap_row);
        const int tap_h = tap_row - tap_d * pool.kernel[1], tap_w = tap - tap_row * pool.kernel[2];
        Chosen result{{of_d.start + tap_d, of_h.start + tap_h, of_w.start + tap_w}, true, true};
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            const int at = result.at[axis];
            result.is_inside = result.is_inside && at >= box.from[axis] && at < box.to[axis];
        }
        result.is_alone = of_d.has_alone(tap_d) && of_h.has_alone(tap_h) && of_w.has_alone(tap_w);
        return result;
    }

    // Of the windows that chose an element the first adds up the gradients of all.
    __device__ __forceinline__ void add_up(const Chosen& element, int d, int h, int w) const {
        int low[3] = {d, h, w}, high[3] = {d, h, w};
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) over[axis].widen(element.at[axis], low[axis], high[axis]);
        const Index own = place(d, h, w);
        A sum = A(0);
#pragma unroll 1
        for (int other_d = low[0]; other_d <= high[0]; ++other_d) {
            const int tap_d = element.at[0] - over[0].start(other_d);
#pragma unroll 1
            for (int other_h = low[1]; other_h <= high[1]; ++other_h) {
                const int tap_row = tap_d * pool.kernel[1] + element.at[1] - over[1].start(other_h);
                Index other = place(other_d, other_h, low[2]);
#pragma unroll 1
                for (int other_w = low[2]; other_w <= high[2]; ++other_w, other += step) {
                    const int tap = tap_row * pool.kernel[2] + element.at[2] - over[2].start(other_w);
                    if (argmax[other] != tap) continue;
                    if (other < own) return;
                    sum += to_accumulate(dy[other]);
                }
            }
        }
        write(element, sum);
    }
    __device__ __forceinline__ void write(const Chosen& element, A sum) const {
        made[plane.place(box, element.at[0], element.at[1], element.at[2])] = from_accumulate<T>(sum);
    }

    __device__ __forceinline__ void run() const {
        int begin[3], end[3];
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            begin[axis] = over[axis].first_over(box.from[axis]);
            end[axis] = over[axis].end_over(box.to[axis], pool.input[axis]);
        }
        const int columns = end[2] - begin[2];
        if (columns <= 0) return;
        PoolWalk first(columns, box.worker, box.workers);
        first.row += begin[1];
#pragma unroll 1
        for (int d = begin[0]; d < end[0]; ++d) {
            const FractionalWindow of_d = over[0][d];
            bool are_alone = true;
            PoolWalk walk = first;
#pragma unroll 1
            while (walk.row < end[1]) {
                int h[kFractionalAtOnce], w[kFractionalAtOnce];
                unsigned char taps[kFractionalAtOnce];
                T gradients[kFractionalAtOnce];
#pragma unroll
                for (int u = 0; u < kFractionalAtOnce; ++u) {
                    h[u] = walk.row, w[u] = begin[2] + walk.column;
                    walk.next();
                    if (h[u] >= end[1]) continue;
                    const Index i = place(d, h[u], w[u]);
                    taps[u] = argmax[i];
                    gradients[u] = dy[i];
                }
#pragma unroll
                for (int u = 0; u < kFractionalAtOnce; ++u) {
                    if (h[u] >= end[1]) continue;
                    const Chosen element = chosen(of_d, h[u], w[u], taps[u]);
                    are_alone = are_alone && element.is_alone;
                    if (element.is_inside && element.is_alone)
                        write(element, A(0) + to_accumulate(gradients[u]));
                }
            }
            if (are_alone) continue;
#pragma unroll 1
            for (walk = first; walk.row < end[1]; walk.next()) {
                const int w = begin[2] + walk.column;
                const Chosen element = chosen(of_d, walk.row, w, argmax[place(d, walk.row, w)]);
                if (element.is_inside && !element.is_alone) add_up(element, d, walk.row, w);
            }
        }
    }
};

// dx = sum of the gradients of the windows that chose the element, in the order of the outputs.
//   dy       y's shape
//   dx       x's shape: every element is written once
// Launch: as fractional_max_pool_forward; a block has boxes of inputs, of kBoxBytes at most.
template <typename T, typename Index>
__global__ void __launch_bounds__(kFractionalThreads, kBoxBlocks<Index> - 1)
    fractional_max_pool_backward(const T* dy, const unsigned char* argmax, const int* starts, T* dx,
                                 FractionalPool pool) {
    __shared__ uint2 kept[kFractionalStarts / 2];
    __shared__ uint4 words[kBoxBytes / sizeof(uint4)];
    T* const made = reinterpret_cast<T*>(words);
    FractionalWindow* const windows = reinterpret_cast<FractionalWindow*>(kept);
    const int count = static_cast<int>(pool.starts.divisor);
    const bool last = pool.boxes.channels_last != 0;
    // Planes side by side: neighbours of an axis in different banks.
    const int apart = (1 << pool.boxes.log2_group) + (last ? 1 : 0);
    const bool are_kept = count <= kFractionalStarts / 2 / apart;
    const int first_of[3] = {0, pool.output[0], pool.output[0] + pool.output[1]};
    for (unsigned long long number = blockIdx.x; number < pool.boxes.number; number += gridDim.x) {
        const PoolBox box(pool.boxes, number);
        clear_box<T>(pool.boxes, box, words);
        const int* const first = starts + (box.image * pool.boxes.channels + box.first) * count;
        if (are_kept) {
#pragma unroll 2
            for (int n = threadIdx.x; n < box.planes * count; n += kFractionalThreads) {
                const int plane = pool.by_starts.quotient(n), i = n - plane * count;
                const int axis = i >= first_of[2] ? 2 : i >= first_of[1] ? 1 : 0;
                const int before = axis == 2 ? first_of[2] : axis == 1 ? first_of[1] : 0;
                const int outputs = axis == 2 ? pool.output[2] : axis == 1 ? pool.output[1] : pool.output[0];
                const int kernel = axis == 2 ? pool.kernel[2] : axis == 1 ? pool.kernel[1] : pool.kernel[0];
                windows[last ? i * apart + plane : n] =
                    FractionalWindow(first + plane * count + before, i - before, outputs, kernel);
            }
        }
        __syncthreads();
        if (box.own < box.planes) {
            const long long before = box.before(pool.boxes, pool.output, box.own);
            const auto scatter = [&](auto is_kept) {
                constexpr bool kKept = decltype(is_kept)::value;
                const int window_step = last ? apart : 1;
                const FractionalWindow* const kept_first = windows + (last ? box.own : box.own * count);
                const int* const own = first + static_cast<long long>(box.own) * count;
                const auto along = [&](int axis) {
                    return FractionalWindows<kKept>{kept_first + first_of[axis] * window_step,
                                                    own + first_of[axis], window_step, pool.output[axis],
                                                    pool.kernel[axis]};
                };
                const FractionalWindows<kKept> over[3] = {along(0), along(1), along(2)};
                const Index step = last ? static_cast<Index>(pool.boxes.channels) : 1;
                const PlaneInBox plane(pool.boxes, box);
                ScatterInBox<T, Index, kKept>{dy + before, argmax + before, made, pool, box, over, step,
                                              plane}
                    .run();
            };
            if (are_kept) {
                scatter(Is<true>());
            } else {
                scatter(Is<false>());
            }
        }
        __syncthreads();
        write_box(pool.boxes, box, made, dx);
        __syncthreads();
    }
}
