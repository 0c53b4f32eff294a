// Pooling by adaptive windows: large ones forward, and all that have few over an element backward.
#include "argmax.cuh"
#include "pool_box.cuh"
#include "pool_divisor.cuh"
#include "pool_reduction.cuh"
#include "running_max.cuh"

// What a thread takes together: the vectors of neighbouring rows, or columns.
constexpr int kTakenTogether = 6;

// What a thread has found of Width columns, or channels, since it was put away last.
//   lanes.start(tap);                  // what is taken has this tap, or later ones
//   lanes.take(vector, tap);
//   if (lanes.must_be_put(next_tap))   // after kTakenTogether taps, before those from `next_tap` on
//       lanes.put(values, apart, ...);  // lane k into values[k * apart], and it has to start again
// `finds_first` says that there is nothing yet where it is put. kByPlanes: it must be put away after each
// plane.
template <typename T, int Width>
struct LargestLanes {
    using Value = Largest<accumulate_t<T>>;
    static constexpr bool kByPlanes = false;
    RunningMax<T, Width> largest;
    int first_tap;  // from which `largest` counts

    __device__ __forceinline__ void start(int tap) {
        const int none[Width] = {};
        largest.start_with_nothing(none);
        first_tap = tap;
    }
    __device__ __forceinline__ void take(const Vector<T, Width>& vector, int tap) {
        largest.take(largest.of(vector), tap - first_tap);
    }
    __device__ __forceinline__ bool must_be_put(int next_tap) const {
        return next_tap - first_tap > largest.kMostTaps - kTakenTogether;
    }
    __device__ __forceinline__ void put(Value* values, int apart, bool finds_first) const {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            Value value{largest.value(k), first_tap + largest.tap(k)};
            if (!finds_first) value = values[k * apart].combine(value);
            value.put(values[k * apart]);
        }
    }
};
template <typename T, int Width>
struct SumLanes {
    using Value = Sum<accumulate_t<T>>;
    static constexpr bool kByPlanes = true;
    Value sums[Width];
    int taken;

    __device__ __forceinline__ void start(int) {
#pragma unroll
        for (int k = 0; k < Width; ++k) sums[k] = Value::identity();
        taken = 0;
    }
    __device__ __forceinline__ void take(const Vector<T, Width>& vector, int tap) {
#pragma unroll
        for (int k = 0; k < Width; ++k) sums[k].take(widened(vector, k), tap);
    }
    __device__ __forceinline__ bool must_be_put(int) {
        taken += kTakenTogether;
        return taken + kTakenTogether > Value::kTakes;
    }
    __device__ __forceinline__ void put(Value* values, int apart, bool finds_first) const {
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            const Value before = finds_first ? Value::identity() : values[k * apart];
            before.combine(sums[k]).put(values[k * apart]);
        }
    }
};

// What becomes of a window's largest value, and of its sum.
template <typename T>
struct MaxOutput {
    using Value = Largest<accumulate_t<T>>;
    template <int Width>
    using Lanes = LargestLanes<T, Width>;
    const T* x;
    T* y;
    unsigned char* argmax;
    int channels;  // side by side

    __device__ __forceinline__ void operator()(const PoolWindow& window, const PoolPosition<int>& output,
                                               long long i, const Value& largest) const {
        const int chosen[1] = {largest.position};
        y[i] = from_accumulate<T>(largest.value);
        // A NaN keeps its bits.
        if (largest.value != largest.value) {
            const int rows = window.by_kernel[2].quotient(largest.position);
            const int kd = window.by_kernel[1].quotient(rows);
            const int tap[3] = {kd, rows - kd * window.kernel[1], largest.position - rows * window.kernel[2]};
            long long place = output.image;
#pragma unroll
            for (int axis = 0; axis < 3; ++axis) {
                const int origin = AdaptiveTaps(window, axis, output.at[axis]).origin;
                place = place * window.input[axis] + origin + tap[axis];
            }
            y[i] = x[place * channels + i % channels];
        }
        store_argmax<1>(argmax, i, chosen, window.argmax_bytes);
    }
};
template <typename T>
struct AvgOutput {
    using Value = Sum<accumulate_t<T>>;
    template <int Width>
    using Lanes = SumLanes<T, Width>;
    T* y;
    const PoolDivisor<accumulate_t<T>>& divisor;

    __device__ __forceinline__ void operator()(const PoolWindow& window, const PoolPosition<int>& output,
                                               long long i, const Value& sum) const {
        long long taps = 1;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) taps *= AdaptiveTaps(window, axis, output.at[axis]).count;
        y[i] = from_accumulate<T>(sum.times(divisor.of_taps(taps)));
    }
};

// Of planes. A row of windows reads its rows of inputs once: a thread has a vector of columns and walks down
// them, and what it found of each column is left in shared memory, where the windows of the row take it.
//   x        [images, input] T, aligned to 16 bytes
//   finish   called with the output's place and number, and its value
// Launch: 1-D, kPoolThreads, any number of blocks; units are vectors of Width columns of the input's rows, of
// each row of windows. A row has at most kPoolThreads of them.
template <int Width, typename T, typename Finish>
__device__ __forceinline__ void reduce_columns(const T* x, const PoolWindow& window, const Finish& finish,
                                               typename Finish::Value* columns) {
    using Value = typename Finish::Value;
    const int vectors = static_cast<int>(window.units[2]), width = vectors * Width;
    const int height = static_cast<int>(window.input[1]), outputs = static_cast<int>(window.output[2]);
    const int rows_of_block = kPoolThreads / vectors;
    const int own_row = window.by_units[2].quotient(static_cast<int>(threadIdx.x));
    const int left = (static_cast<int>(threadIdx.x) - own_row * vectors) * Width;
    const long long rows = window.images * window.units[0] * window.units[1];
    for (long long first = static_cast<long long>(blockIdx.x) * rows_of_block; first < rows;
         first += static_cast<long long>(gridDim.x) * rows_of_block) {
        if (own_row < rows_of_block && first + own_row < rows) {
            const PoolPosition<int> output = pool_position<int>(window, first * vectors, own_row * vectors);
            const AdaptiveTaps depth(window, 0, output.at[0]);
            const AdaptiveTaps taps(window, 1, output.at[1]);
            const T* image = x + output.image * input_image(window) + left;
            Value* const own = columns + threadIdx.x * Width;
            typename Finish::template Lanes<Width> some;
            some.start(0);
            bool finds_first = true;
#pragma unroll 1
            for (int kd = 0; kd < depth.count; ++kd) {
                int place = ((depth.origin + kd) * height + taps.origin) * width;
                int tap = kd * window.kernel[1];
                const auto put = [&] {
                    some.put(own, 1, finds_first);
                    some.start(tap);
                    finds_first = false;
                };
#pragma unroll 1
                for (int rest = taps.count; rest > 0; rest -= kTakenTogether) {
                    Vector<T, Width> values[kTakenTogether];
#pragma unroll
                    for (int u = 0; u < kTakenTogether; ++u) {
                        if (u < rest) values[u] = Vector<T, Width>::load(image + place);
                        place += width;
                    }
#pragma unroll
                    for (int u = 0; u < kTakenTogether; ++u) {
                        if (u >= rest) break;
                        some.take(values[u], tap + u);
                    }
                    tap += kTakenTogether;
                    if (some.must_be_put(tap)) put();
                }
                if (some.kByPlanes || kd + 1 == depth.count) put();
            }
        }
        __syncthreads();
        const int here = static_cast<int>(min(static_cast<long long>(rows_of_block), rows - first));
        for (int i = threadIdx.x; i < here * outputs; i += kPoolThreads) {
            const int row = window.by_output[2].quotient(i), place = i - row * outputs;
            const AdaptiveTaps taps(window, 2, place);
            PoolPosition<int> output = pool_position<int>(window, first * vectors, row * vectors);
            output.at[2] = place;
            Value value = Value::identity();
            for (int k = 0; k < taps.count; ++k)
                value = value.combine(columns[row * width + taps.origin + k].in_row(window.kernel[2], k));
            finish(window, output, (first + row) * outputs + place, value);
        }
        __syncthreads();
    }
}

// The window of a block, and the first of the vectors of its channels.
struct BlockWindow {
    PoolPosition<int> output;
    long long vectors_before;  // of the windows before this one
    int first_group;

    __device__ __forceinline__ BlockWindow(const PoolWindow& window, int lanes, int block) {
        const int groups = static_cast<int>(window.groups), tiles = (groups + lanes - 1) / lanes;
        const int number = block / tiles;
        vectors_before = static_cast<long long>(number) * groups;
        output = pool_position<int>(window, vectors_before, 0);
        first_group = (block - number * tiles) * lanes;
    }
};

// Of channels side by side: a block has a window, and each of its rows of threads a part of its pieces, which
// are kTakenTogether neighbours of a row.
//   x       [images, input, groups] of Width T, aligned to 16 bytes
//   lanes   vectors of channels of a block, a power of two up to 32
// Launch: 1-D, kPoolThreads, one block for each window and each `lanes` of its vectors.
template <typename T, typename Finish>
__device__ __forceinline__ void reduce_windows(const T* x, const PoolWindow& window, const Finish& finish,
                                               int lanes) {
    using Value = typename Finish::Value;
    constexpr int kWidth = kVectorWidth<T>;
    // What threads have found, of value k of all threads side by side: no conflicts.
    __shared__ Value partial[kWidth][kPoolThreads];
    const int slots = kPoolThreads / lanes, lane = threadIdx.x & (lanes - 1), slot = threadIdx.x / lanes;
    const int groups = static_cast<int>(window.groups);
    const BlockWindow own(window, lanes, static_cast<int>(blockIdx.x));
    const PoolPosition<int>& output = own.output;
    const int group = own.first_group + lane;
    if (group < groups) {
        const int height = static_cast<int>(window.input[1]), width = static_cast<int>(window.input[2]);
        const AdaptiveTaps depth(window, 0, output.at[0]);
        const AdaptiveTaps rows(window, 1, output.at[1]), columns(window, 2, output.at[2]);
        // The values of an image can be counted in 32 bits.
        const int step = groups * kWidth, size = static_cast<int>(input_image(window)) * kWidth;
        const T* image = x + kept(output.image * size + group * kWidth);
        const int pieces = (columns.count + kTakenTogether - 1) / kTakenTogether;
        const int down = slots / pieces, across = slots - down * pieces;
        const int first_row = slot / pieces, first_piece = slot - first_row * pieces;
        typename Finish::template Lanes<kWidth> some;
        // One that has no piece has found nothing, beyond all taps.
        some.start(first_row < rows.count ? tap_number(window, 0, first_row, first_piece * kTakenTogether)
                                          : 0x7fffffff);
        bool finds_first = true;
#pragma unroll 1
        for (int kd = 0; kd < depth.count; ++kd) {
            const int corner = ((depth.origin + kd) * height + rows.origin) * width + columns.origin;
            int kh = first_row, kw = first_piece * kTakenTogether;
            int tap = tap_number(window, kd, kh, kw);
            const auto put = [&] {
                some.put(&partial[0][threadIdx.x], kPoolThreads, finds_first);
                some.start(tap);
                finds_first = false;
            };
#pragma unroll 1
            while (kh < rows.count) {
                const int left = columns.count - kw;
                const T* source = image + (corner + kh * width + kw) * step;
                Vector<T> values[kTakenTogether];
#pragma unroll
                for (int u = 0; u < kTakenTogether; ++u) {
                    if (u < left) values[u] = Vector<T>::load(source);
                    source += step;
                }
#pragma unroll
                for (int u = 0; u < kTakenTogether; ++u) {
                    if (u >= left) break;
                    some.take(values[u], tap + u);
                }
                kh += down;
                kw += across * kTakenTogether;
                if (kw >= columns.count) {
                    kw -= pieces * kTakenTogether;
                    ++kh;
                }
                tap = tap_number(window, kd, kh, kw);
                if (some.must_be_put(tap)) put();
            }
            if (some.kByPlanes || kd + 1 == depth.count) put();
        }
    }
    __syncthreads();
    // A thread combines what all slots have of a channel. Its window is found again: the loop has no
    // registers to keep it.
    const BlockWindow found(window, lanes, static_cast<int>(kept(blockIdx.x)));
    for (int i = threadIdx.x; i < lanes * kWidth; i += kPoolThreads) {
        const int k = i % kWidth, vector = i / kWidth;
        if (found.first_group + vector >= groups) break;
        Value value = partial[k][vector].in_row(1, 0);
        for (int j = 1; j < slots; ++j) value = value.combine(partial[k][j * lanes + vector].in_row(1, 0));
        finish(window, found.output, (found.vectors_before + found.first_group) * kWidth + i, value);
    }
}

template <typename T, bool ChannelsLast, typename Finish>
__device__ __forceinline__ void reduce_adaptive(const T* x, const PoolWindow& window, const Finish& finish,
                                                int lanes) {
    if constexpr (ChannelsLast) {
        reduce_windows(x, window, finish, lanes);
    } else {
        __shared__ typename Finish::Value columns[kPoolThreads * kVectorWidth<T>];
        if (static_cast<int>(window.units[2]) == static_cast<int>(window.input[2])) {
            reduce_columns<1>(x, window, finish, columns);
        } else {
            reduce_columns<kVectorWidth<T>>(x, window, finish, columns);
        }
    }
}

// Blocks of the forward that must fit on a multiprocessor at once: its threads keep what they found of eight
// columns, or channels, and the vectors that they wait for. Sums of what takes a conversion each, and those
// of Blackwell's code, would be spilled.
constexpr int kForwardBlocks = 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <typename T>
constexpr int kSumBlocks = 2;
#else
template <typename T>
constexpr int kSumBlocks = kForwardBlocks;
template <>
constexpr int kSumBlocks<__half> = 2;
#endif

// As max_pool_forward, of large windows.
//   x, y, argmax   as there
// Launch: as reduce_columns, or as reduce_windows for channels last.
template <typename T, bool ChannelsLast>
__global__ void __launch_bounds__(kPoolThreads, kForwardBlocks)
    max_pool_forward_adaptive(const T* x, T* y, unsigned char* argmax, int lanes, PoolWindow window) {
    reduce_adaptive<T, ChannelsLast>(
        x, window,
        MaxOutput<T>{x, y, argmax, ChannelsLast ? static_cast<int>(window.groups) * kVectorWidth<T> : 1},
        lanes);
}

// As avg_pool_forward, of windows of so many taps that they are summed with compensation.
//   x, y   as there
// Launch: as max_pool_forward_adaptive.
template <typename T, bool ChannelsLast>
__global__ void __launch_bounds__(kPoolThreads, kSumBlocks<T>)
    avg_pool_forward_adaptive(const T* x, T* y, int lanes, PoolWindow window,
                              PoolDivisor<accumulate_t<T>> divisor) {
    reduce_adaptive<T, ChannelsLast>(x, window, AvgOutput<T>{y, divisor}, lanes);
}

// As avg_pool_backward, of adaptive windows, few of them over an element.
//   dy, dx   as there
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are vectors, of planes along the
// width, of the rows of inputs that a row of windows is the first over.
template <typename T, bool ChannelsLast>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<int>)
    avg_pool_backward_adaptive(const T* dy, T* dx, PoolWindow window, PoolDivisor<accumulate_t<T>> divisor) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>, kColumns = ChannelsLast ? 1 : kWidth;
    const int height = static_cast<int>(window.input[1]), width = static_cast<int>(window.input[2]);
    const int rows = static_cast<int>(window.output[1]), columns = static_cast<int>(window.output[2]);
    const int groups = static_cast<int>(window.groups), channels = ChannelsLast ? kWidth : 1;
    for_each_unit<int>(window, [&](const PoolPosition<int>& position, long long) {
        const T* image = dy + position.image * output_image(window) * channels;
        const int left = position.at[2] * kColumns, first = position.at[1];
        const CoveringWindows<int> depth(window, 0, position.at[0]);
        const int first_column = CoveringWindows<int>(window, 2, left).first;
        const int last_column = CoveringWindows<int>(window, 2, min(left + kColumns, width) - 1).last;
        // What rows under the windows first .. last along height get, from the last window to the first.
        const auto gradients_under = [&](int last) {
            A sum[kWidth] = {};
#pragma unroll 1
            for (int d = depth.last; d >= depth.first; --d) {
                const int deep = AdaptiveTaps(window, 0, d).count;
#pragma unroll 1
                for (int h = last; h >= first; --h) {
                    const int plane = deep * AdaptiveTaps(window, 1, h).count;
                    const int row_of_windows = (d * rows + h) * columns;
                    A row[kWidth] = {};
#pragma unroll 1
                    for (int w = last_column; w >= first_column; --w) {
                        const AdaptiveTaps taps(window, 2, w);
                        const A factor = divisor.of_taps(static_cast<long long>(plane) * taps.count);
                        const int place = row_of_windows + w;
                        if constexpr (ChannelsLast) {
                            const Vector<T> gradients =
                                Vector<T>::load(image + (place * groups + position.group) * kWidth);
#pragma unroll
                            for (int k = 0; k < kWidth; ++k) row[k] += widened(gradients, k) * factor;
                        } else {
                            const A share = to_accumulate(image[place]) * factor;
#pragma unroll
                            for (int k = 0; k < kWidth; ++k) {
                                if (static_cast<unsigned>(left + k - taps.origin) <
                                    static_cast<unsigned>(taps.count))
                                    row[k] += share;
                            }
                        }
                    }
#pragma unroll
                    for (int k = 0; k < kWidth; ++k) sum[k] += row[k];
                }
            }
            return rounded<T>(sum);
        };
        const auto first_row_of = [&](int windows) {
            return window.by_output[1].quotient(windows * height + rows - 1);
        };
        const long long step = static_cast<long long>(width) * groups * channels;
        const int end = first_row_of(first + 1);
        int row = first_row_of(first);
        T* target = dx + position.image * input_image(window) * channels +
                    (position.at[0] * height + row) * step +
                    (position.at[2] * groups + position.group) * kWidth;
        // Rows under the same windows are alike: those up to where the next window begins.
        int last = first, next = AdaptiveTaps(window, 1, first + 1).origin;
#pragma unroll 1
        while (row < end) {
            while (next <= row) next = AdaptiveTaps(window, 1, ++last + 1).origin;
            const Vector<T> gradients = gradients_under(last);
            const int alike = min(next, end);
#pragma unroll 1
            for (; row < alike; ++row, target += step)
                store_pieces<ChannelsLast, kWidth>(gradients, target, width - left, width);
        }
    });
}

// Threads of a block that has a box; most of them only clear it and write it. Few, which begin less often;
// and the blocks that must fit on a multiprocessor at once.
constexpr int kBoxThreads = 128, kBoxBlocks = 8;

// As max_pool_backward, of adaptive windows, few of them over an element: the last of those that chose it
// adds up the gradients of all, into a box in shared memory.
//   dy, argmax, dx   as there
// Launch: 1-D, kBoxThreads, any number of blocks (grid-stride); boxes are of inputs, of kBoxBytes at most.
template <typename T>
__global__ void __launch_bounds__(kBoxThreads, kBoxBlocks)
    max_pool_backward_adaptive(const T* dy, const unsigned char* argmax, T* dx, PoolWindow window,
                               PoolBoxes boxes) {
    using A = accumulate_t<T>;
    __shared__ uint4 words[kBoxBytes / sizeof(uint4)];
    T* const made = reinterpret_cast<T*>(words);
    const int size[3] = {static_cast<int>(window.output[0]), static_cast<int>(window.output[1]),
                         static_cast<int>(window.output[2])};
    const int step = boxes.channels_last != 0 ? static_cast<int>(boxes.channels) : 1;
    for (unsigned long long number = blockIdx.x; number < boxes.number; number += gridDim.x) {
        const PoolBox box(boxes, number);
        if (number != blockIdx.x) __syncthreads();
        clear_box<T>(boxes, box, words);
        __syncthreads();
        if (box.own < box.planes && box.worker < size[0] * size[1] * size[2]) {
            int begin[3], end[3];
#pragma unroll
            for (int axis = 0; axis < 3; ++axis) {
                begin[axis] = CoveringWindows<int>(window, axis, box.from[axis]).first;
                end[axis] = CoveringWindows<int>(window, axis, box.to[axis] - 1).last + 1;
            }
            const long long before = box.before(boxes, size, box.own);
            const PlaneInBox plane_in_box(boxes, box);
            const auto chosen_by = [&](int place) {
                int chosen[1];
                load_argmax<1>(argmax, before + place * step, chosen, window.argmax_bytes);
                return chosen[0];
            };
            const auto take = [&](int d, int h, int w) {
                const int own = place_of<int>(size, d, h, w), tap = chosen_by(own);
                const int row = window.by_kernel[2].quotient(tap), kd = window.by_kernel[1].quotient(row);
                const int at[3] = {AdaptiveTaps(window, 0, d).origin + kd,
                                   AdaptiveTaps(window, 1, h).origin + row - kd * window.kernel[1],
                                   AdaptiveTaps(window, 2, w).origin + tap - row * window.kernel[2]};
#pragma unroll
                for (int axis = 0; axis < 3; ++axis) {
                    if (at[axis] < box.from[axis] || at[axis] >= box.to[axis]) return;
                }
                const CoveringWindows<int> depth(window, 0, at[0]), height(window, 1, at[1]),
                    width(window, 2, at[2]);
                A sum = A(0);
#pragma unroll 1
                for (int other_d = depth.last; other_d >= depth.first; --other_d) {
#pragma unroll 1
                    for (int other_h = height.last; other_h >= height.first; --other_h) {
                        const int first_tap = tap_number(window, covering_tap(window, 0, at[0], other_d),
                                                         covering_tap(window, 1, at[1], other_h), 0);
#pragma unroll 1
                        for (int other_w = width.last; other_w >= width.first; --other_w) {
                            const int other = place_of<int>(size, other_d, other_h, other_w);
                            if (chosen_by(other) != first_tap + covering_tap(window, 2, at[2], other_w))
                                continue;
                            if (other > own) return;
                            sum += to_accumulate(dy[before + other * step]);
                        }
                    }
                }
                made[plane_in_box.place(at[0], at[1], at[2])] = from_accumulate<T>(sum);
            };
#pragma unroll 1
            for (int d = begin[0]; d < end[0]; ++d) {
                PoolWalk walk(end[2] - begin[2], box.worker, box.workers);
#pragma unroll 1
                for (; walk.row < end[1] - begin[1]; walk.next())
                    take(d, begin[1] + walk.row, begin[2] + walk.column);
            }
        }
        __syncthreads();
        write_box(boxes, box, made, dx);
    }
}
