// Pooling by adaptive windows: large ones forward, and all that have few over an element backward.
#include "argmax.cuh"
#include "pool_box.cuh"
#include "pool_divisor.cuh"
#include "pool_reduction.cuh"

// What becomes of a window's largest value, and of its sum.
template <typename T>
struct MaxOutput {
    using Value = Largest<accumulate_t<T>>;
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
    constexpr int kAtOnce = 4;
    const int vectors = static_cast<int>(window.units[2]), width = vectors * Width;
    const int height = static_cast<int>(window.input[1]), outputs = static_cast<int>(window.output[2]);
    const int rows_of_block = kPoolThreads / vectors;
    const int own_row = window.by_units[2].quotient(static_cast<int>(threadIdx.x));
    const int left = (static_cast<int>(threadIdx.x) - own_row * vectors) * Width;
    const long long rows = pool_units(window) / vectors;
    for (long long first = static_cast<long long>(blockIdx.x) * rows_of_block; first < rows;
         first += static_cast<long long>(gridDim.x) * rows_of_block) {
        if (own_row < rows_of_block && first + own_row < rows) {
            const PoolPosition<int> output = pool_position<int>(window, (first + own_row) * vectors, 0);
            const AdaptiveTaps depth(window, 0, output.at[0]);
            const AdaptiveTaps taps(window, 1, output.at[1]);
            const T* image = x + output.image * input_image(window) + left;
            Value all[Width], some[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                all[k] = Value::identity();
                some[k] = Value::from(0);
            }
            const auto fold = [&] {
                if constexpr (Value::kFolds) {
#pragma unroll
                    for (int k = 0; k < Width; ++k) {
                        all[k] = all[k].combine(some[k]);
                        some[k] = Value::identity();
                    }
                }
            };
#pragma unroll 1
            for (int kd = 0; kd < depth.count; ++kd) {
                const T* source = image + ((depth.origin + kd) * height + taps.origin) * width;
                const int tap = kd * window.kernel[1];
#pragma unroll 1
                for (int kh = 0; kh < taps.count; kh += kAtOnce) {
                    Vector<T, Width> values[kAtOnce];
#pragma unroll
                    for (int u = 0; u < kAtOnce; ++u) {
                        if (kh + u < taps.count)
                            values[u] = Vector<T, Width>::load(source + (kh + u) * width);
                    }
#pragma unroll
                    for (int u = 0; u < kAtOnce; ++u) {
                        if (kh + u >= taps.count) break;
#pragma unroll
                        for (int k = 0; k < Width; ++k) some[k].take(widened(values[u], k), tap + kh + u);
                    }
                    if ((kh + kAtOnce) % Value::kTakes == 0) fold();
                }
                fold();
            }
#pragma unroll
            for (int k = 0; k < Width; ++k)
                (Value::kFolds ? all[k] : some[k]).put(columns[own_row * width + left + k]);
        }
        __syncthreads();
        const int here = static_cast<int>(min(static_cast<long long>(rows_of_block), rows - first));
        for (int i = threadIdx.x; i < here * outputs; i += kPoolThreads) {
            const int row = window.by_output[2].quotient(i), place = i - row * outputs;
            const AdaptiveTaps taps(window, 2, place);
            PoolPosition<int> output = pool_position<int>(window, (first + row) * vectors, 0);
            output.at[2] = place;
            Value value = Value::identity();
            for (int k = 0; k < taps.count; ++k)
                value = value.combine(columns[row * width + taps.origin + k].in_row(window.kernel[2], k));
            finish(window, output, (first + row) * outputs + place, value);
        }
        __syncthreads();
    }
}

// Of channels side by side: a block has a window, and each of its rows of threads a part of the positions.
//   x       [images, input, groups] of Width T, aligned to 16 bytes
//   lanes   vectors of channels of a block, a power of two up to 32
// Launch: 1-D, kPoolThreads, one block for each window and each `lanes` of its vectors.
template <typename T, typename Finish>
__device__ __forceinline__ void reduce_windows(const T* x, const PoolWindow& window, const Finish& finish,
                                               int lanes) {
    using Value = typename Finish::Value;
    constexpr int kWidth = kVectorWidth<T>, kAtOnce = 4;
    __shared__ Value partial[kPoolThreads][kWidth];
    const int slots = kPoolThreads / lanes, lane = threadIdx.x & (lanes - 1), slot = threadIdx.x / lanes;
    const int groups = static_cast<int>(window.groups), tiles = (groups + lanes - 1) / lanes;
    const int block = blockIdx.x / tiles, group = (blockIdx.x - block * tiles) * lanes + lane;
    const PoolPosition<int> output = pool_position<int>(window, static_cast<long long>(block) * groups, 0);
    Value all[kWidth], some[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) all[k] = some[k] = Value::identity();
    const auto fold = [&] {
        if constexpr (Value::kFolds) {
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                all[k] = all[k].combine(some[k]);
                some[k] = Value::identity();
            }
        }
    };
    if (group < groups) {
        const int height = static_cast<int>(window.input[1]), width = static_cast<int>(window.input[2]);
        const AdaptiveTaps depth(window, 0, output.at[0]);
        const AdaptiveTaps rows(window, 1, output.at[1]), columns(window, 2, output.at[2]);
        // The values of an image can be counted in 32 bits.
        const int step = groups * kWidth, size = static_cast<int>(input_image(window)) * kWidth;
        const T* image = x + kept(output.image * size + group * kWidth);
        // From a position of a thread to its next one, but for the end of a row.
        const int down = slots / columns.count, across = slots - down * columns.count;
        const int next_tap = down * window.kernel[2] + across, next_place = down * width + across;
#pragma unroll 1
        for (int kd = 0; kd < depth.count; ++kd) {
            const int first = kd * window.kernel[1] * window.kernel[2];
            const int end = first + rows.count * window.kernel[2];
            const int corner = ((depth.origin + kd) * height + rows.origin) * width + columns.origin;
            const int kh = slot / columns.count;
            int kw = slot - kh * columns.count, taken = 0;
            int tap = first + kh * window.kernel[2] + kw, place = corner + kh * width + kw;
            if (kd == 0 && tap < end) {
#pragma unroll
                for (int k = 0; k < kWidth; ++k) some[k] = Value::from(tap);
            }
            while (tap < end) {
                Vector<T> values[kAtOnce];
                int taps[kAtOnce];
#pragma unroll
                for (int u = 0; u < kAtOnce; ++u) {
                    taps[u] = tap;
                    if (tap < end) values[u] = Vector<T>::load(image + place * step);
                    tap += next_tap;
                    place += next_place;
                    kw += across;
                    if (kw >= columns.count) {
                        kw -= columns.count;
                        tap += window.kernel[2] - columns.count;
                        place += width - columns.count;
                    }
                }
#pragma unroll
                for (int u = 0; u < kAtOnce; ++u) {
                    if (taps[u] >= end) break;
#pragma unroll
                    for (int k = 0; k < kWidth; ++k) some[k].take(widened(values[u], k), taps[u]);
                }
                taken += kAtOnce;
                if (taken < Value::kTakes) continue;
                taken = 0;
                fold();
            }
            fold();
        }
    }
    if constexpr (!Value::kFolds) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) all[k] = some[k];
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) all[k].put(partial[threadIdx.x][k]);
    // Two halves at a time.
    for (int half = slots / 2; half > 0; half /= 2) {
        __syncthreads();
        if (slot >= half) continue;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            all[k] = all[k].combine(partial[threadIdx.x + half * lanes][k].in_row(1, 0));
            all[k].put(partial[threadIdx.x][k]);
        }
    }
    if (slot > 0 || group >= groups) return;
    const long long first = (static_cast<long long>(block) * groups + group) * kWidth;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) finish(window, output, first + k, all[k]);
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
// columns, or channels, and the vectors that they wait for.
constexpr int kForwardBlocks = 3;

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
__global__ void __launch_bounds__(kPoolThreads, kForwardBlocks)
    avg_pool_forward_adaptive(const T* x, T* y, int lanes, PoolWindow window,
                              PoolDivisor<accumulate_t<T>> divisor) {
    reduce_adaptive<T, ChannelsLast>(x, window, AvgOutput<T>{y, divisor}, lanes);
}

// Writes the rows of inputs whose first window along height is the position's, a vector of each: neighbours
// of a plane, as far as the row goes, or channels. Calls make(height, row) for the vector of a row where it
// may be another than that above.
//   dx          [images, input, groups]
//   same(row)   whether a row under the position's windows alone is as the one above it
template <bool ChannelsLast, typename T, typename Same, typename Make>
__device__ __forceinline__ void write_own_rows(const PoolWindow& window, const PoolPosition<int>& position,
                                               T* dx, Same same, Make make) {
    constexpr int kWidth = kVectorWidth<T>;
    const int height = static_cast<int>(window.input[1]), rows = static_cast<int>(window.output[1]);
    const int begin = window.by_output[1].quotient(position.at[1] * height + rows - 1);
    const int end = window.by_output[1].quotient((position.at[1] + 1) * height + rows - 1);
    const int width = static_cast<int>(window.input[2]), left = position.at[2] * (ChannelsLast ? 1 : kWidth);
    const long long step = width * window.groups * (ChannelsLast ? kWidth : 1);
    T* target = dx + position.image * input_image(window) * (ChannelsLast ? kWidth : 1) +
                (position.at[0] * height + begin) * step +
                (position.at[2] * static_cast<int>(window.groups) + position.group) * kWidth;
    Vector<T> result;
    int above = -1;
#pragma unroll 1
    for (int row = begin; row < end; ++row, target += step) {
        CoveringWindows<int> over(window, 1, row);
        over.first = position.at[1];
        if (over.last != above || !same(row)) result = make(over, row);
        above = over.last;
        store_pieces<ChannelsLast, kWidth>(result, target, width - left, width);
    }
}

// As avg_pool_backward, of adaptive windows, few of them over an element.
//   dy, dx   as there
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are vectors, of planes along the
// width, of the rows of inputs of each row of windows.
template <typename T, bool ChannelsLast>
__global__ void __launch_bounds__(kPoolThreads, kPoolBlocks<int>)
    avg_pool_backward_adaptive(const T* dy, T* dx, PoolWindow window, PoolDivisor<accumulate_t<T>> divisor) {
    using A = accumulate_t<T>;
    constexpr int kWidth = kVectorWidth<T>, kColumns = ChannelsLast ? 1 : kWidth;
    const int rows = static_cast<int>(window.output[1]), columns = static_cast<int>(window.output[2]);
    const int groups = static_cast<int>(window.groups);
    for_each_unit<int>(window, [&](const PoolPosition<int>& position, long long) {
        const T* image = dy + position.image * output_image(window) * (ChannelsLast ? kWidth : 1);
        const CoveringWindows<int> depth(window, 0, position.at[0]);
        const int left = position.at[2] * kColumns;
        const auto make = [&](const CoveringWindows<int>& height, int) {
            A sum[kWidth] = {}, row[kWidth] = {};
            int known[2] = {-1, -1}, plane_taps = 0;
            const auto visit = [&](const int (&output)[3]) {
                if (output[0] != known[0] || output[1] != known[1]) {
                    known[0] = output[0], known[1] = output[1];
                    plane_taps =
                        AdaptiveTaps(window, 0, output[0]).count * AdaptiveTaps(window, 1, output[1]).count;
                }
                const AdaptiveTaps taps(window, 2, output[2]);
                const A factor = divisor.of_taps(static_cast<long long>(plane_taps) * taps.count);
                const int place = (output[0] * rows + output[1]) * columns + output[2];
                if constexpr (ChannelsLast) {
                    const Vector<T> gradients =
                        Vector<T>::load(image + (place * groups + position.group) * kWidth);
#pragma unroll
                    for (int k = 0; k < kWidth; ++k) row[k] += widened(gradients, k) * factor;
                } else {
                    const A share = to_accumulate(image[place]) * factor;
#pragma unroll
                    for (int k = 0; k < kWidth; ++k) {
                        if (static_cast<unsigned>(left + k - taps.origin) < static_cast<unsigned>(taps.count))
                            row[k] += share;
                    }
                }
            };
            for_each_window_over_vector<kColumns>(window, depth, height, left, visit, [&] {
#pragma unroll
                for (int k = 0; k < kWidth; ++k) {
                    sum[k] += row[k];
                    row[k] = A(0);
                }
            });
            Vector<T> result;
#pragma unroll
            for (int k = 0; k < kWidth; ++k) result[k] = from_accumulate<T>(sum[k]);
            return result;
        };
        write_own_rows<ChannelsLast>(window, position, dx, [](int) { return true; }, make);
    });
}

// Threads of a block that has a box; most of them only clear it and write it. Few, which begin less often.
constexpr int kBoxThreads = 128;

// As max_pool_backward, of adaptive windows, few of them over an element: the last of those that chose it
// adds up the gradients of all, into a box in shared memory.
//   dy, argmax, dx   as there
// Launch: 1-D, kBoxThreads, any number of blocks (grid-stride); boxes are of inputs, of kBoxBytes at most.
template <typename T>
__global__ void __launch_bounds__(kBoxThreads, 2 * kBoxBlocks<int>)
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
                made[plane_in_box.place(box, at[0], at[1], at[2])] = from_accumulate<T>(sum);
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
        __syncthreads();
    }
}
