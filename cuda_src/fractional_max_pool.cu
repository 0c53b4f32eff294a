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
#include "dynamic_shared.cuh"
#include "fast_division.cuh"
#include "pool_box.cuh"

constexpr int kFractionalThreads = 256;
constexpr int kFractionalStarts = 4096;  // that a block keeps
// What is on its way at a time: taps of some windows; and backward windows.
constexpr int kFractionalTaps = 3, kFractionalWindows = 4;
template <int Kernel>
constexpr int kFractionalAtOnce = Kernel > 0 ? 4 : 3;

// Blocks that must fit on a multiprocessor at once: what is on its way takes registers, and so do the 64-bit
// indices of images of 2^31 elements and more, and taps of any number.
template <typename Index, int Kernel>
constexpr int kFractionalBlocks = Kernel == 2          ? 4
                                  : sizeof(Index) == 4 ? 3
                                                       : 2;

struct FractionalPool {
    PoolBoxes boxes;
    Divisor64 starts;  // of a plane, along all axes
    Divisor32 by_starts, by_kernel[3];
    int input[3], output[3];
    int kernel[3];
    int sample_of[3];  // which of a plane's samples is of the axis; unused where there is one output
    int samples;       // of a plane
    int box_words;     // vectors of shared memory before the windows
};
static_assert(sizeof(FractionalPool) == 288, "the launcher packs it with this size");

// Taps of a window: Kernel x Kernel of a plane; or any, where Kernel is 0.
//   int at[3];
//   FractionalTaps<2>{pool}.split(3, at);  // 0, 1, 1
template <int Kernel>
struct FractionalTaps {
    static constexpr bool kIsFlat = Kernel > 0;
    static constexpr int kFirstAxis = kIsFlat ? 1 : 0;
    const FractionalPool& pool;

    __device__ __forceinline__ int size(int axis) const {
        if constexpr (kIsFlat) return axis == 0 ? 1 : Kernel;
        return pool.kernel[axis];
    }
    __device__ __forceinline__ int count() const { return size(0) * size(1) * size(2); }
    // Of a tap: its place along each axis.
    __device__ __forceinline__ void split(int tap, int (&place)[3]) const {
        int row;
        if constexpr (kIsFlat) {
            row = static_cast<unsigned int>(tap) / Kernel;
        } else {
            row = pool.by_kernel[2].quotient(tap);
        }
        place[0] = size(0) == 1 ? 0 : pool.by_kernel[1].quotient(row);
        place[1] = row - place[0] * size(1);
        place[2] = tap - row * size(2);
    }
};

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
template <typename T, int Kernel, typename Index>
__global__ void __launch_bounds__(kFractionalThreads, kFractionalBlocks<Index, Kernel>)
    fractional_max_pool_forward(const T* x, const accumulate_t<T>* samples, int* starts, T* y,
                                unsigned char* argmax, accumulate_t<T> alpha_0, accumulate_t<T> alpha_1,
                                accumulate_t<T> alpha_2, unsigned long long seed, unsigned long long offset,
                                const unsigned long long* rng_state, FractionalPool pool) {
    using A = accumulate_t<T>;
    using Taps = FractionalTaps<Kernel>;
    __shared__ int kept[kFractionalStarts];
    __shared__ A drawn[3 * kFractionalThreads];
    __shared__ Index offsets[256];  // of taps, from a window's corner
    const DropoutStream stream = dropout_stream(seed, offset, rng_state);
    const bool last = pool.boxes.channels_last != 0;
    const Index step = last ? static_cast<Index>(pool.boxes.channels) : 1;
    const Taps all_taps{pool};
    const int taps = all_taps.count();
    if constexpr (!Taps::kIsFlat) {
        if (const int tap = threadIdx.x; tap < taps) {
            int at[3];
            all_taps.split(tap, at);
            offsets[tap] = place_of<Index>(pool.input, at[0], at[1], at[2]) * step;
        }
    }
    const int count = static_cast<int>(pool.starts.divisor), before_h = pool.output[0],
              before_w = before_h + pool.output[1];
    // Planes side by side: neighbours of an axis in different banks.
    const int apart = (1 << pool.boxes.log2_group) + (last ? 1 : 0);
    const bool are_kept = static_cast<long long>(count) * apart <= kFractionalStarts;
    const auto rule = [&](int plane, int axis) {
        const int outputs = of_three(axis, pool.output[0], pool.output[1], pool.output[2]);
        const int end = of_three(axis, pool.input[0] - pool.kernel[0], pool.input[1] - pool.kernel[1],
                                 pool.input[2] - pool.kernel[2]);
        return FractionalRule<A>{drawn[plane * 3 + axis], of_three(axis, alpha_0, alpha_1, alpha_2), outputs,
                                 end};
    };
    for (unsigned long long number = blockIdx.x; number < pool.boxes.number; number += gridDim.x) {
        const PoolBox box(pool.boxes, number);
        if (number != blockIdx.x) __syncthreads();
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
            const PoolColumns lane(pool.boxes, box);
            const T* const source = kept_pointer(x + box.before(pool.boxes, pool.input, box.own));
            const long long before = box.before(pool.boxes, pool.output, box.own);
            T* const own_y = kept_pointer(y + before);
            unsigned char* const own_argmax = kept_pointer(argmax + before);
            const Index row_step = pool.output[2] * step * lane.rows;
            const int last_row = box.to[1] - 1;
#pragma unroll 1
            for (int d = Taps::kIsFlat ? 0 : box.from[0]; d < (Taps::kIsFlat ? 1 : box.to[0]); ++d) {
                const int start_d = Taps::kIsFlat ? 0 : over_d[d];
#pragma unroll 1
                for (int w = box.from[2] + lane.column; w < box.to[2]; w += lane.columns) {
                    const Index first_place = place_of<Index>(pool.input, start_d, 0, over_w[w]);
                    int h = box.from[1] + lane.row;
                    Index place = place_of<Index>(pool.output, d, h, w) * step;
#pragma unroll 1
                    for (; h <= last_row; h += kFractionalWindows * lane.rows) {
                        const T* corner[kFractionalWindows];
#pragma unroll
                        for (int u = 0; u < kFractionalWindows; ++u) {
                            // The last row again, where there are no more.
                            const int start_h = over_h[min(h + u * lane.rows, last_row)];
                            corner[u] =
                                source + (first_place + static_cast<Index>(start_h) * pool.input[2]) * step;
                        }
                        T best[kFractionalWindows];
                        int chosen[kFractionalWindows] = {};
#pragma unroll
                        for (int u = 0; u < kFractionalWindows; ++u) best[u] = corner[u][0];
                        const auto take = [&](int u, T value, int tap) {
                            const A wide = to_accumulate(value);
                            if (wide > to_accumulate(best[u]) || wide != wide) {
                                best[u] = value;
                                chosen[u] = tap;
                            }
                        };
                        if constexpr (Taps::kIsFlat) {
                            T value[Kernel * Kernel][kFractionalWindows];
#pragma unroll
                            for (int tap = 1; tap < Kernel * Kernel; ++tap) {
                                const Index at =
                                    place_of<Index>(pool.input, 0, tap / Kernel, tap % Kernel) * step;
#pragma unroll
                                for (int u = 0; u < kFractionalWindows; ++u) value[tap][u] = corner[u][at];
                            }
#pragma unroll
                            for (int tap = 1; tap < Kernel * Kernel; ++tap) {
#pragma unroll
                                for (int u = 0; u < kFractionalWindows; ++u) take(u, value[tap][u], tap);
                            }
                        } else {
#pragma unroll 1
                            for (int tap = 1; tap < taps; tap += kFractionalTaps) {
                                T value[kFractionalTaps][kFractionalWindows];
#pragma unroll
                                for (int t = 0; t < kFractionalTaps; ++t) {
                                    // The last one again changes nothing, unless it is NaN: then it is the
                                    // last.
                                    const Index at = offsets[min(tap + t, taps - 1)];
#pragma unroll
                                    for (int u = 0; u < kFractionalWindows; ++u) value[t][u] = corner[u][at];
                                }
#pragma unroll
                                for (int t = 0; t < kFractionalTaps; ++t) {
#pragma unroll
                                    for (int u = 0; u < kFractionalWindows; ++u)
                                        take(u, value[t][u], min(tap + t, taps - 1));
                                }
                            }
                        }
#pragma unroll
                        for (int u = 0; u < kFractionalWindows; ++u) {
                            if (h + u * lane.rows <= last_row) {
                                own_y[place] = best[u];
                                own_argmax[place] = static_cast<unsigned char>(chosen[u]);
                            }
                            place += row_step;
                        }
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
    }
}

// A window along one axis: where it begins, and what is known of its taps.
template <int Kernel>
struct alignas(8) FractionalWindow {
    static constexpr unsigned int kInside = 1, kAlone = 1 << 16;
    int start;
    // Of Kernel taps: of each one, whether it is in the box, shifted by it, and whether moreover no other
    // window is over it. Of any number: the first one without another window, and the end of these.
    unsigned int bits;

    FractionalWindow() = default;
    //   starts     of the axis
    //   from, to   the box, along the axis
    __device__ __forceinline__ FractionalWindow(const int* starts, int i, int outputs, int kernel, int from,
                                                int to)
        : start(starts[i]) {
        const int before = i == 0 ? start - kernel : starts[i - 1];
        const int after = i + 1 == outputs ? start + kernel : starts[i + 1];
        const int begin = max(before + kernel - start, 0), end = min(after - start, kernel);
        if constexpr (Kernel > 0) {
            const unsigned int inside = taps_between(from - start, to - start);
            bits = inside * kInside | (inside & taps_between(begin, end)) * kAlone;
        } else {
            bits = begin | static_cast<unsigned int>(end) << 16;
        }
    }
    static __device__ __forceinline__ unsigned int taps_between(int begin, int end) {
        return (1u << min(max(end, 0), Kernel)) - 1 & ~((1u << min(max(begin, 0), Kernel)) - 1);
    }
    // kInside, and kAlone with it, where the tap is so.
    __device__ __forceinline__ unsigned int tap(int tap, int from, int to) const {
        if constexpr (Kernel > 0) return bits >> tap;
        const int at = start + tap;
        if (at < from || at >= to) return 0;
        const bool is_alone = tap >= static_cast<int>(bits & 0xffffu) && tap < static_cast<int>(bits >> 16);
        return is_alone ? kInside | kAlone : kInside;
    }
};

// The windows of one plane along one axis.
//   Kept   windows, `step` apart, in shared memory; else they are made of their starts
template <int Kernel, bool Kept>
struct FractionalWindows {
    using Window = FractionalWindow<Kernel>;
    const Window* windows;
    const int* starts;
    int step, outputs, kernel, from, to;

    __device__ __forceinline__ Window operator[](int i) const {
        if constexpr (Kept) {
            return windows[i * step];
        } else {
            return Window(starts, i, outputs, kernel, from, to);
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
template <typename T, int Kernel, typename Index, bool Kept>
struct ScatterInBox {
    using A = accumulate_t<T>;
    using Taps = FractionalTaps<Kernel>;
    using Window = FractionalWindow<Kernel>;
    const T* dy;
    const unsigned char* argmax;
    T* made;
    const FractionalPool& pool;
    const PoolBox& box;
    const FractionalWindows<Kernel, Kept> (&over)[3];
    Index step;
    PlaneInBox plane;

    __device__ __forceinline__ Index place(int d, int h, int w) const {
        return place_of<Index>(pool.output, d, h, w) * step;
    }

    // What a window chose: where, and whether in the box, and by no other one.
    struct Chosen {
        int at[3];
        unsigned int bits;
        __device__ __forceinline__ bool is_alone() const { return (bits & Window::kAlone) != 0; }
        __device__ __forceinline__ bool is_shared() const {
            return (bits & (Window::kInside | Window::kAlone)) == Window::kInside;
        }
    };
    __device__ __forceinline__ Chosen chosen(const Window& of_d, const Window& of_h, const Window& of_w,
                                             int tap) const {
        int of_tap[3];
        Taps{pool}.split(tap, of_tap);
        Chosen result{
            {of_d.start + of_tap[0], of_h.start + of_tap[1], of_w.start + of_tap[2]},
            of_h.tap(of_tap[1], box.from[1], box.to[1]) & of_w.tap(of_tap[2], box.from[2], box.to[2])};
        if constexpr (!Taps::kIsFlat) result.bits &= of_d.tap(of_tap[0], box.from[0], box.to[0]);
        return result;
    }

    // Of the windows that chose an element the first adds up the gradients of all.
    __device__ __forceinline__ void add_up(const Chosen& element, int d, int h, int w) const {
        int low[3] = {d, h, w}, high[3] = {d, h, w};
#pragma unroll
        for (int axis = Taps::kFirstAxis; axis < 3; ++axis)
            over[axis].widen(element.at[axis], low[axis], high[axis]);
        const Index own = place(d, h, w);
        A sum = A(0);
#pragma unroll 1
        for (int other_d = low[0]; other_d <= high[0]; ++other_d) {
            const int tap_d = element.at[0] - over[0].start(other_d);
#pragma unroll 1
            for (int other_h = low[1]; other_h <= high[1]; ++other_h) {
                const int tap_row = tap_d * Taps{pool}.size(1) + element.at[1] - over[1].start(other_h);
                Index other = place(other_d, other_h, low[2]);
#pragma unroll 1
                for (int other_w = low[2]; other_w <= high[2]; ++other_w, other += step) {
                    const int tap = tap_row * Taps{pool}.size(2) + element.at[2] - over[2].start(other_w);
                    if (argmax[other] != tap) continue;
                    if (other < own) return;
                    sum += to_accumulate(dy[other]);
                }
            }
        }
        write(element, sum);
    }
    __device__ __forceinline__ void write(const Chosen& element, A sum) const {
        made[plane.place(element.at[0], element.at[1], element.at[2])] = from_accumulate<T>(sum);
    }

    __device__ __forceinline__ void run() const {
        int begin[3] = {}, end[3] = {1};
#pragma unroll
        for (int axis = Taps::kFirstAxis; axis < 3; ++axis) {
            begin[axis] = over[axis].first_over(box.from[axis]);
            end[axis] = over[axis].end_over(box.to[axis], pool.input[axis]);
        }
        constexpr int kAtOnce = kFractionalAtOnce<Kernel>;
        const PoolColumns lane(pool.boxes, box);
        const Index row_step = place(0, 1, 0);
#pragma unroll 1
        for (int d = begin[0]; d < end[0]; ++d) {
            const Window of_d = Taps::kIsFlat ? Window{} : over[0][d];
#pragma unroll 1
            for (int w = begin[2] + lane.column; w < end[2]; w += lane.columns) {
                const Window of_w = over[2][w];
                const Index first = place(d, 0, w);
                bool is_any_shared = false;
#pragma unroll 1
                for (int h = begin[1] + lane.row; h < end[1]; h += kAtOnce * lane.rows) {
                    int row[kAtOnce];
                    unsigned char taps[kAtOnce];
                    T gradients[kAtOnce];
#pragma unroll
                    for (int u = 0; u < kAtOnce; ++u) {
                        // The first one again, where there are no more.
                        row[u] = h + u * lane.rows < end[1] ? h + u * lane.rows : h;
                        const Index i = first + row[u] * row_step;
                        taps[u] = argmax[i];
                        gradients[u] = dy[i];
                    }
#pragma unroll
                    for (int u = 0; u < kAtOnce; ++u) {
                        const Chosen element = chosen(of_d, over[1][row[u]], of_w, taps[u]);
                        is_any_shared = is_any_shared || element.is_shared();
                        // A sum, for it makes +0 of -0.
                        const A gradient = A(0) + to_accumulate(gradients[u]);
                        if (element.is_alone()) write(element, gradient);
                    }
                }
                if (!is_any_shared) continue;
#pragma unroll 1
                for (int h = begin[1] + lane.row; h < end[1]; h += lane.rows) {
                    const Chosen element = chosen(of_d, over[1][h], of_w, argmax[first + h * row_step]);
                    if (element.is_shared()) add_up(element, d, h, w);
                }
            }
        }
    }
};

// dx = sum of the gradients of the windows that chose the element, in the order of the outputs.
//   dy       y's shape
//   dx       x's shape: every element is written once
// Launch: as fractional_max_pool_forward; a block has boxes of inputs. Shared memory for one, and then for
// the windows that are kept.
template <typename T, int Kernel, typename Index>
__global__ void __launch_bounds__(kFractionalThreads, kFractionalBlocks<Index, Kernel>)
    fractional_max_pool_backward(const T* dy, const unsigned char* argmax, const int* starts, T* dx,
                                 FractionalPool pool) {
    using Taps = FractionalTaps<Kernel>;
    using Window = FractionalWindow<Kernel>;
    DYNAMIC_SHARED(words);
    T* const made = reinterpret_cast<T*>(words);
    Window* const windows = reinterpret_cast<Window*>(words + pool.box_words);
    const int count = static_cast<int>(pool.starts.divisor);
    const bool last = pool.boxes.channels_last != 0;
    // Planes side by side: neighbours of an axis in different banks.
    const int apart = (1 << pool.boxes.log2_group) + (last ? 1 : 0);
    const bool are_kept = static_cast<long long>(count) * apart <= kFractionalStarts / 2;
    const int first_of[3] = {0, pool.output[0], pool.output[0] + pool.output[1]};
    for (unsigned long long number = blockIdx.x; number < pool.boxes.number; number += gridDim.x) {
        const PoolBox box(pool.boxes, number);
        if (number != blockIdx.x) __syncthreads();
        clear_box<T>(pool.boxes, box, words);
        const int* const first = starts + (box.image * pool.boxes.channels + box.first) * count;
        if (are_kept) {
#pragma unroll 2
            for (int n = threadIdx.x; n < box.planes * count; n += kFractionalThreads) {
                const int plane = pool.by_starts.quotient(n), i = n - plane * count;
                const int axis = i >= first_of[2] ? 2 : i >= first_of[1] ? 1 : 0;
                const auto along = [&](const int (&of_axes)[3]) {
                    return of_three(axis, of_axes[0], of_axes[1], of_axes[2]);
                };
                const int before = along(first_of);
                windows[last ? i * apart + plane : n] =
                    Window(first + plane * count + before, i - before, along(pool.output),
                           Taps{pool}.size(axis), along(box.from), along(box.to));
            }
        }
        __syncthreads();
        if (box.own < box.planes) {
            const long long before = box.before(pool.boxes, pool.output, box.own);
            const auto scatter = [&](auto is_kept) {
                constexpr bool kKept = decltype(is_kept)::value;
                const int window_step = last ? apart : 1;
                const Window* const kept_first = windows + (last ? box.own : box.own * count);
                const int* const own = first + static_cast<long long>(box.own) * count;
                const auto along = [&](int axis) {
                    return FractionalWindows<Kernel, kKept>{kept_first + first_of[axis] * window_step,
                                                            own + first_of[axis],
                                                            window_step,
                                                            pool.output[axis],
                                                            Taps{pool}.size(axis),
                                                            box.from[axis],
                                                            box.to[axis]};
                };
                const FractionalWindows<Kernel, kKept> over[3] = {along(0), along(1), along(2)};
                const Index step = last ? static_cast<Index>(pool.boxes.channels) : 1;
                const PlaneInBox plane(pool.boxes, box);
                ScatterInBox<T, Kernel, Index, kKept>{kept_pointer(dy + before),
                                                      kept_pointer(argmax + before),
                                                      made,
                                                      pool,
                                                      box,
                                                      over,
                                                      step,
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
    }
}
