// Fractional max pooling (Graham, 2014): windows of one size whose starts are drawn, for each plane by
// itself.
//
// All ranks are three-dimensional; a missing depth has size 1. In every kernel:
//   starts   [planes, outputs along depth + height + width] where windows begin, ascending
//   argmax   [y's shape] number of the tap chosen; at most 256 taps
//
// A block has boxes of some planes at a time, of outputs or of inputs. It keeps where the windows of those
// planes begin at hand, which is asked for many times.
#include "dropout_rule.cuh"
#include "fast_division.cuh"
#include "pool_box.cuh"

constexpr int kFractionalThreads = 256;
constexpr int kFractionalStarts = 4096;  // that a block keeps
// What is on its way at a time: taps of some windows; and backward windows.
constexpr int kFractionalTaps = 3, kFractionalWindows = 4, kFractionalAtOnce = 4;

// Blocks that must fit on a multiprocessor at once: what is on its way takes registers, and so do the 64-bit
// indices of images of 2^31 elements and more.
template <typename Index>
constexpr int kFractionalBlocks = sizeof(Index) == 4 ? 3 : 2;

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

// The windows of one plane along one axis, by PyTorch's rule: floor((i + u) * alpha) - floor(u * alpha), and
// the last one at the end.
//   alpha   (input - kernel) / (outputs - 1)
template <typename A>
struct FractionalRule {
    A u, alpha;
    int outputs, last;

    __device__ __forceinline__ int start(int i) const {
        if (i + 1 == outputs) return last;
        return min(static_cast<int>((A(i) + u) * alpha) - static_cast<int>(u * alpha), last);
    }
};

// Starts of the windows of one plane along one axis: kept in shared memory, `step` apart, or made anew.
template <typename A, bool Kept>
struct FractionalStarts {
    const int* first;
    int step;
    FractionalRule<A> rule;

    __device__ __forceinline__ int operator[](int i) const {
        if constexpr (Kept) {
            return first[i * step];
        } else {
            return rule.start(i);
        }
    }
};

// Of a number between 0 and 2: that of three, without a table in memory.
template <typename Value>
__device__ __forceinline__ Value of_three(int number, Value zero, Value one, Value two) {
    return number == 0 ? zero : number == 1 ? one : two;
}

// y = largest value of each window, the first of equal ones, of several NaN the last; and its tap.
//   x, y      [samples, channels, input or output], or with the channels last
//   samples   [planes, pool.samples] u in [0, 1), or null: word number g >> 8, times 2^-24, is number g
//   starts    the first block of a plane writes them, for the backward
//   alpha_0, alpha_1, alpha_2   of the axes, see FractionalRule
// Launch: 1-D, kFractionalThreads, any number of blocks (grid-stride); a block has boxes of outputs.
template <typename T, typename Index>
__global__ void __launch_bounds__(kFractionalThreads, kFractionalBlocks<Index>)
    fractional_max_pool_forward(const T* x, const accumulate_t<T>* samples, int* starts, T* y,
                                unsigned char* argmax, accumulate_t<T> alpha_0, accumulate_t<T> alpha_1,
                                accumulate_t<T> alpha_2, unsigned long long seed, unsigned long long offset,
                                const unsigned long long* rng_state, FractionalPool pool) {
    using A = accumulate_t<T>;
    __shared__ int kept[kFractionalStarts];
    __shared__ A drawn[3 * kFractionalThreads];
    __shared__ Index offsets[256];  // of taps, from a window's corner
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    const bool last = pool.boxes.channels_last != 0;
    const Index step = last ? static_cast<Index>(pool.boxes.channels) : 1;
    const int taps = pool.kernel[0] * pool.kernel[1] * pool.kernel[2];
    if (const int tap = threadIdx.x; tap < taps) {
        const int row = pool.by_kernel[2].quotient(tap), d = pool.by_kernel[1].quotient(row);
        offsets[tap] =
            place_of<Index>(pool.input, d, row - d * pool.kernel[1], tap - row * pool.kernel[2]) * step;
    }
    const int count = static_cast<int>(pool.starts.divisor), before_h = pool.output[0],
              before_w = before_h + pool.output[1];
    // Planes side by side: neighbours of an axis in different banks.
    const int apart = (1 << pool.boxes.log2_group) + (last ? 1 : 0);
    const bool are_kept = count <= kFractionalStarts / apart;
    const auto rule = [&](int plane, int axis) {
        const int outputs = of_three(axis, pool.output[0], pool.output[1], pool.output[2]);
        const int end = of_three(axis, pool.input[0] - pool.kernel[0], pool.input[1] - pool.kernel[1],
                                 pool.input[2] - pool.kernel[2]);
        return FractionalRule<A>{drawn[plane * 3 + axis], of_three(axis, alpha_0, alpha_1, alpha_2), outputs,
                                 end};
    };
    for (unsigned long long number = blockIdx.x; number < pool.boxes.number; number += gridDim.x) {
        const PoolBox box(pool.boxes, number);
        const long long first = box.image * pool.boxes.channels + box.first;
        for (int n = threadIdx.x; n < 3 * box.planes; n += kFractionalThreads) {
            const int plane = n / 3, axis = n - plane * 3;
            // Of a single window nothing is drawn.
            drawn[n] = A(0);
            if (of_three(axis, pool.output[0], pool.output[1], pool.output[2]) == 1) continue;
            const unsigned long long g = static_cast<unsigned long long>(first + plane) *
                                             static_cast<unsigned long long>(pool.samples) +
                                         static_cast<unsigned long long>(of_three(
                                             axis, pool.sample_of[0], pool.sample_of[1], pool.sample_of[2]));
            drawn[n] = samples != nullptr ? samples[g]
                                          : A(word_of(stream.block(g >> 2), static_cast<int>(g & 3)) >> 8) *
                                                A(5.9604644775390625e-8);
        }
        __syncthreads();
        const bool writes = box.from[0] == 0 && box.from[1] == 0 && box.from[2] == 0;
        if (are_kept || writes) {
            for (int n = threadIdx.x; n < box.planes * count; n += kFractionalThreads) {
                const int plane = pool.by_starts.quotient(n), i = n - plane * count;
                const int axis = i >= before_w ? 2 : i >= before_h ? 1 : 0;
                const int start = rule(plane, axis).start(i - of_three(axis, 0, before_h, before_w));
                if (are_kept) kept[last ? i * apart + plane : n] = start;
                if (writes) starts[first * count + n] = start;
            }
        }
        __syncthreads();
        const auto pooled = [&](auto is_kept) {
            using Starts = FractionalStarts<A, decltype(is_kept)::value>;
            const int* const own = kept + (last ? box.own : box.own * count);
            const int apart_in_plane = last ? apart : 1;
            const Starts over_d{own, apart_in_plane, rule(box.own, 0)};
            const Starts over_h{own + before_h * apart_in_plane, apart_in_plane, rule(box.own, 1)};
            const Starts over_w{own + before_w * apart_in_plane, apart_in_plane, rule(box.own, 2)};
            const int rows = box.to[1] - box.from[1];
            const T* const source = x + box.before(pool.boxes, pool.input, box.own);
            const long long before = box.before(pool.boxes, pool.output, box.own);
#pragma unroll 1
            for (int d = box.from[0]; d < box.to[0]; ++d) {
                PoolWalk walk(box.to[2] - box.from[2], box.worker, box.workers);
                const int start_d = over_d[d];
#pragma unroll 1
                while (walk.row < rows) {
                    const T* corner[kFractionalWindows];
                    Index place[kFractionalWindows];
                    bool exists[kFractionalWindows];
#pragma unroll
                    for (int u = 0; u < kFractionalWindows; ++u) {
                        exists[u] = walk.row < rows;
                        corner[u] = source;
                        if (exists[u]) {
                            const int h = box.from[1] + walk.row, w = box.from[2] + walk.column;
                            corner[u] += place_of<Index>(pool.input, start_d, over_h[h], over_w[w]) * step;
                            place[u] = place_of<Index>(pool.output, d, h, w) * step;
                        }
                        walk.next();
                    }
                    T best[kFractionalWindows];
                    int chosen[kFractionalWindows] = {};
#pragma unroll
                    for (int u = 0; u < kFractionalWindows; ++u) best[u] = corner[u][0];
#pragma unroll 1
                    for (int tap = 1; tap < taps; tap += kFractionalTaps) {
                        T value[kFractionalTaps][kFractionalWindows];
#pragma unroll
                        for (int t = 0; t < kFractionalTaps; ++t) {
                            // The last one again changes nothing, unless it is NaN: then it is the last.
                            const Index at = offsets[min(tap + t, taps - 1)];
#pragma unroll
                            for (int u = 0; u < kFractionalWindows; ++u) value[t][u] = corner[u][at];
                        }
#pragma unroll
                        for (int t = 0; t < kFractionalTaps; ++t) {
#pragma unroll
                            for (int u = 0; u < kFractionalWindows; ++u) {
                                const A wide = to_accumulate(value[t][u]);
                                if (wide > to_accumulate(best[u]) || wide != wide) {
                                    best[u] = value[t][u];
                                    chosen[u] = min(tap + t, taps - 1);
                                }
                            }
                        }
                    }
#pragma unroll
                    for (int u = 0; u < kFractionalWindows; ++u) {
                        if (!exists[u]) continue;
                        y[before + place[u]] = best[u];
                        argmax[before + place[u]] = static_cast<unsigned char>(chosen[u]);
                    }
                }
            }
        };
        if (box.own < box.planes) {
            if (are_kept) {
                pooled(Constant<true>());
            } else {
                pooled(Constant<false>());
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
__global__ void __launch_bounds__(kFractionalThreads, kFractionalBlocks<Index>)
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
                scatter(Constant<true>());
            } else {
                scatter(Constant<false>());
            }
        }
        __syncthreads();
        write_box(pool.boxes, box, made, dx);
        __syncthreads();
    }
}
