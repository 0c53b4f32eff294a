// The windows of a pooling, and which unit of work a thread has.
//
// All ranks are three-dimensional (depth, height, width; missing axes have size 1). Both layouts are one: an
// image is (depth, height, width, groups) where a group is a vector of Width channels, for channels last; and
// (depth, height, width, 1) of single values, an image being a plane, for channels first.
//
// A pooling whose units are outputs:
//   for_each_unit<Index>(window, [&](const PoolPosition<Index>& output, long long unit) {
//       const PoolExtent<Index> extent(window, lengths, output.image);
//       const T* image = x + output.image * input_image(window);
//       A sum = 0;
//       for_each_tap(window, output, extent, [&](int tap, Index i) { sum += to_accumulate(image[i]); });
//       y[unit] = from_accumulate<T>(sum);
//   });
#pragma once

#include "fast_division.cuh"
#include "vector_io.cuh"

constexpr int kPoolThreads = 256;

// Blocks that must fit on a multiprocessor at once: they leave a thread 64 registers, or 128 for the 64-bit
// indices of images of 2^31 elements and more, which would be spilled otherwise.
template <typename Index>
constexpr int kPoolBlocks = sizeof(Index) == 4 ? 4 : 2;

struct PoolWindow {
    int kernel[3], stride[3], dilation[3], pad[3];  // pad: before the first element
    int adaptive;      // window i of an axis is floor(i L / o) .. ceil((i + 1) L / o) - 1 instead
    int argmax_bytes;  // of a saved tap: 1, 2 or 4
    int axes;          // that the arrays have: the last ones
    long long input[3], output[3];
    long long images;    // samples, or planes
    long long channels;  // images of a sample: 1, or its planes
    long long groups;    // vectors side by side at each position
    // What a thread does at a time: an output, an input, or a small tile of them. An image has `units` of
    // them (depth, height, width, groups).
    long long units[3];
    Divisor32 by_units[3], by_image, by_groups;  // by numbers of units, where those are below 2^31
    Divisor32 by_stride[3], by_dilation[3], by_output[3], by_input[3], by_kernel[3];
};

static_assert(sizeof(PoolWindow) == 400, "the launcher packs it with this size");

// Position of a unit in an array of images.
template <typename Index>
struct PoolPosition {
    long long image;
    Index at[3];
    Index group;
};

// Units of all images.
__device__ __forceinline__ long long pool_units(const PoolWindow& window) {
    return window.images * window.units[0] * window.units[1] * window.units[2] * window.groups;
}

// Position of unit number `first + step`.
//   first   of the block, so that the 64-bit division is the same for all of its threads
//   step    of the thread, below kPoolThreads
template <typename Index>
__device__ __forceinline__ PoolPosition<Index> pool_position(const PoolWindow& window, long long first,
                                                             int step) {
    const long long size = window.units[0] * window.units[1] * window.units[2] * window.groups;
    PoolPosition<Index> position;
    Index rest;
    if (sizeof(Index) == 4 && first < (1ll << 31) - kPoolThreads) {
        const int unit = static_cast<int>(first) + step;
        const int image = window.by_image.quotient(unit);
        position.image = image;
        rest = unit - image * static_cast<Index>(size);
    } else {
        position.image = first / size;
        // Below size + kPoolThreads: the thread may be in a later image than the block's first unit.
        rest = static_cast<Index>(first - position.image * size) + step;
        const Index later = quotient(rest, window.by_image, size);
        position.image += later;
        rest -= later * static_cast<Index>(size);
    }
    const Index place = quotient(rest, window.by_groups, window.groups);
    position.group = rest - place * static_cast<Index>(window.groups);
    const Index height = static_cast<Index>(window.units[1]), width = static_cast<Index>(window.units[2]);
    const Index row = quotient(place, window.by_units[2], width);
    position.at[2] = place - row * width;
    position.at[0] = quotient(row, window.by_units[1], height);
    position.at[1] = row - position.at[0] * height;
    return position;
}

// Calls visit(position, unit) for every unit of the thread.
//   block   where the block begins: its number, or that from the end
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride).
template <typename Index, typename Visit>
__device__ __forceinline__ void for_each_unit(const PoolWindow& window, Visit visit,
                                              unsigned int block = blockIdx.x) {
    const long long total = pool_units(window);
    for (long long first = block * static_cast<long long>(kPoolThreads); first < total;
         first += gridDim.x * static_cast<long long>(kPoolThreads)) {
        if (first + threadIdx.x >= total) break;
        visit(pool_position<Index>(window, first, threadIdx.x), first + threadIdx.x);
    }
}

// Sizes of the image along the axes: the input's, or those that a sample has for itself.
template <typename Index>
struct PoolExtent {
    Index size[3];

    //   lengths   [samples, axes], or null
    __device__ __forceinline__ PoolExtent(const PoolWindow& window, const long long* lengths,
                                          long long image) {
        const long long* own = lengths == nullptr ? nullptr : lengths + image / window.channels * window.axes;
        const int missing = 3 - window.axes;
#pragma unroll
        for (int axis = 0; axis < 3; ++axis) {
            const bool is_own = own != nullptr && axis >= missing;
            size[axis] = static_cast<Index>(is_own ? own[axis - missing] : window.input[axis]);
        }
    }

    __device__ __forceinline__ bool contains(const Index (&at)[3]) const {
        return at[0] < size[0] && at[1] < size[1] && at[2] < size[2];
    }
};

// One window along one axis: its taps begin .. end - 1 are inside the image.
//   const AxisTaps<Index> rows(window, 1, output.at[1], extent.size[1]);
//   for (int tap = rows.begin; tap < rows.end; ++tap) use_row(rows.origin + tap * window.dilation[1]);
template <typename Index>
struct AxisTaps {
    Index origin;  // of tap 0
    int begin, end;

    __device__ __forceinline__ AxisTaps(const PoolWindow& window, int axis, Index output, Index size) {
        int taps = window.kernel[axis];
        if (window.adaptive) {
            const Index input = static_cast<Index>(window.input[axis]);
            const Index outputs = static_cast<Index>(window.output[axis]);
            const Index product = output * input;
            origin = quotient(product, window.by_output[axis], outputs);
            taps = static_cast<int>(quotient(product + input + outputs - 1, window.by_output[axis], outputs) -
                                    origin);
        } else {
            origin = output * window.stride[axis] - window.pad[axis];
        }
        // Taps before a place; only windows that are cut off need the division.
        const int dilation = window.dilation[axis];
        const Divisor32& by_dilation = window.by_dilation[axis];
        begin = origin >= 0
                    ? 0
                    : min(taps, static_cast<int>(quotient(dilation - 1 - origin, by_dilation, dilation)));
        const Index last = origin + static_cast<Index>(taps - 1) * dilation;
        end = last < size
                  ? taps
                  : (origin >= size
                         ? 0
                         : static_cast<int>(quotient(size - origin + dilation - 1, by_dilation, dilation)));
        begin = min(begin, end);
    }
};

// The same of an adaptive window: all of it is inside the image.
//   const AdaptiveTaps rows(window, 1, output.at[1]);  // rows.origin .. rows.origin + rows.count - 1
struct AdaptiveTaps {
    int origin, count;

    __device__ __forceinline__ AdaptiveTaps(const PoolWindow& window, int axis, int output) {
        const int input = static_cast<int>(window.input[axis]);
        const int before = output * input;
        origin = window.by_output[axis].quotient(before);
        count = window.by_output[axis].quotient(before + input + static_cast<int>(window.output[axis]) - 1) -
                origin;
    }
};

// The windows over one input element along one axis: outputs last, last - 1, ..., first.
//   const CoveringWindows<Index> over(window, 1, input.at[1]);
//   for (Index h = over.last; h >= over.first; --h) use(h, covering_tap(window, 1, input.at[1], h));
template <typename Index>
struct CoveringWindows {
    Index first, last;

    __device__ __forceinline__ CoveringWindows(const PoolWindow& window, int axis, Index at) {
        if (window.adaptive) {
            const Index input = static_cast<Index>(window.input[axis]);
            const Index outputs = static_cast<Index>(window.output[axis]);
            first = quotient(at * outputs, window.by_input[axis], input);
            last = quotient((at + 1) * outputs + input - 1, window.by_input[axis], input) - 1;
            return;
        }
        const Index padded = at + window.pad[axis];
        const int stride = window.stride[axis];
        const Index reach =
            padded - static_cast<Index>(window.kernel[axis] - 1) * window.dilation[axis] + stride - 1;
        first = reach < stride ? Index(0) : quotient(reach, window.by_stride[axis], stride);
        last = min(quotient(padded, window.by_stride[axis], stride),
                   static_cast<Index>(window.output[axis]) - 1);
    }
};

// Tap along one axis by which the window at `output` covers the element at `at`; negative if it skips it
// (dilation).
template <typename Index>
__device__ __forceinline__ int covering_tap(const PoolWindow& window, int axis, Index at, Index output) {
    if (window.adaptive) {
        return static_cast<int>(at - quotient(output * static_cast<Index>(window.input[axis]),
                                              window.by_output[axis],
                                              static_cast<Index>(window.output[axis])));
    }
    const Index distance = at + window.pad[axis] - output * window.stride[axis];
    const int dilation = window.dilation[axis];
    if (dilation == 1) return static_cast<int>(distance);
    const Index tap = quotient(distance, window.by_dilation[axis], dilation);
    return tap * dilation == distance ? static_cast<int>(tap) : -1;
}

// Number of a tap; at most 32 bits of it are saved. Averages allow windows of more taps, and do not use it.
__device__ __forceinline__ int tap_number(const PoolWindow& window, int kd, int kh, int kw) {
    const unsigned int rows = static_cast<unsigned int>(window.kernel[1]);
    const unsigned int columns = static_cast<unsigned int>(window.kernel[2]);
    return static_cast<int>((static_cast<unsigned int>(kd) * rows + static_cast<unsigned int>(kh)) * columns +
                            static_cast<unsigned int>(kw));
}

// What is done after a row of taps, unless said otherwise.
struct Nothing {
    __device__ __forceinline__ void operator()() const {}
};

// Calls visit(tap, index) for the taps of the window at `output` that are inside the image, in order, and
// end_row() after each row of them; index is that of the vector within its image.
template <typename Index, typename Visit, typename EndRow = Nothing>
__device__ __forceinline__ void for_each_tap(const PoolWindow& window, const PoolPosition<Index>& output,
                                             const PoolExtent<Index>& extent, Visit visit,
                                             EndRow end_row = EndRow()) {
    const AxisTaps<Index> depth(window, 0, output.at[0], extent.size[0]);
    const AxisTaps<Index> height(window, 1, output.at[1], extent.size[1]);
    const AxisTaps<Index> width(window, 2, output.at[2], extent.size[2]);
    const Index rows = static_cast<Index>(window.input[1]), columns = static_cast<Index>(window.input[2]);
    const Index groups = static_cast<Index>(window.groups);
#pragma unroll 1
    for (int kd = depth.begin; kd < depth.end; ++kd) {
        const Index d = depth.origin + kd * window.dilation[0];
#pragma unroll 1
        for (int kh = height.begin; kh < height.end; ++kh) {
            const Index h = height.origin + kh * window.dilation[1];
            Index index =
                ((d * rows + h) * columns + width.origin + width.begin * window.dilation[2]) * groups +
                output.group;
            const int tap = tap_number(window, kd, kh, 0);
#pragma unroll 1
            for (int kw = width.begin; kw < width.end; ++kw, index += window.dilation[2] * groups)
                visit(tap + kw, index);
            end_row();
        }
    }
}

// Calls visit(tap, index, output) for the windows over an input element, in ascending order of the tap, and
// end_row() after each row of them; index is that of the output vector within its image, output its place
// along the three axes.
//   for_each_covering_window(window, input, [&](int tap, Index i, const Index(&output)[3]) {
//       if (image_of_argmax[i] == tap) sum += to_accumulate(image_of_dy[i]);
//   });
template <typename Index, typename Visit, typename EndRow = Nothing>
__device__ __forceinline__ void for_each_covering_window(const PoolWindow& window,
                                                         const PoolPosition<Index>& input, Visit visit,
                                                         EndRow end_row = EndRow()) {
    const CoveringWindows<Index> depth(window, 0, input.at[0]);
    const CoveringWindows<Index> height(window, 1, input.at[1]);
    const CoveringWindows<Index> width(window, 2, input.at[2]);
    const Index rows = static_cast<Index>(window.output[1]), columns = static_cast<Index>(window.output[2]);
#pragma unroll 1
    for (Index d = depth.last; d >= depth.first; --d) {
        const int kd = covering_tap(window, 0, input.at[0], d);
#pragma unroll 1
        for (Index h = height.last; h >= height.first; --h) {
            const int kh = covering_tap(window, 1, input.at[1], h);
            if (kd < 0 || kh < 0) continue;
            const Index row = (d * rows + h) * columns;
#pragma unroll 1
            for (Index w = width.last; w >= width.first; --w) {
                const int kw = covering_tap(window, 2, input.at[2], w);
                if (kw < 0) continue;
                const int tap = tap_number(window, kd, kh, kw);
                const Index output[3] = {d, h, w};
                visit(tap, (row + w) * static_cast<Index>(window.groups) + input.group, output);
            }
            end_row();
        }
    }
}

// Neighbours of a row of `size`, as far as they are inside: `left` are. A row that does not consist of whole
// vectors may consist of halves or quarters of them.
//   Whole   it consists of whole vectors
//   Vector<T, 4> body;
//   load_pieces<false, 4>(body, row + first, width - first, width);   // the first `width - first` of four
//   store_pieces<false, 4>(body, copy + first, width - first, width);
template <bool Whole, int Piece, typename T, int Count>
__device__ __forceinline__ void load_pieces(Vector<T, Count>& all, const T* source, int left, int size) {
    if constexpr (!Whole && Piece > 1) {
        if (size % Piece != 0) {
            load_pieces<Whole, Piece / 2>(all, source, left, size);
            return;
        }
    }
    if constexpr (Piece == Count) {
        if (Whole || left > 0) all = Vector<T, Count>::load(source);
    } else {
#pragma unroll
        for (int i = 0; i < Count; i += Piece) {
            if (i >= left) continue;
            const Vector<T, Piece> piece = Vector<T, Piece>::load(source + i);
#pragma unroll
            for (int j = 0; j < Piece; ++j) all[i + j] = piece[j];
        }
    }
}
template <bool Whole, int Piece, typename T, int Count>
__device__ __forceinline__ void store_pieces(const Vector<T, Count>& all, T* target, int left, int size) {
    if constexpr (!Whole && Piece > 1) {
        if (size % Piece != 0) {
            store_pieces<Whole, Piece / 2>(all, target, left, size);
            return;
        }
    }
    if constexpr (Piece == Count) {
        if (Whole || left > 0) all.store(target);
    } else {
#pragma unroll
        for (int i = 0; i < Count; i += Piece) {
            if (i >= left) continue;
            Vector<T, Piece> piece;
#pragma unroll
            for (int j = 0; j < Piece; ++j) piece[j] = all[i + j];
            piece.store(target + i);
        }
    }
}

// Inputs along one axis that are a window's alone, where windows do not overlap: its taps, then what it
// skips.
template <typename Index>
struct OwnInputs {
    Index origin, begin, end;

    __device__ __forceinline__ OwnInputs(const PoolWindow& window, int axis, Index output) {
        const Index stride = static_cast<Index>(window.stride[axis]);
        origin = output * stride - window.pad[axis];
        begin = max(origin, Index(0));
        // The last one has what is left.
        end = output + 1 < static_cast<Index>(window.output[axis]) ? origin + stride
                                                                   : static_cast<Index>(window.input[axis]);
    }
};

// Calls visit(tap, index) for the inputs that are the window's alone; tap is negative where it skips one,
// index that of the vector within its image.
//   for_each_own_input(window, output, [&](int tap, Index i) { image[i] = tap == chosen ? dy : zero; });
template <typename Index, typename Visit>
__device__ __forceinline__ void for_each_own_input(const PoolWindow& window,
                                                   const PoolPosition<Index>& output, Visit visit) {
    const OwnInputs<Index> depth(window, 0, output.at[0]);
    const OwnInputs<Index> height(window, 1, output.at[1]);
    const OwnInputs<Index> width(window, 2, output.at[2]);
    const Index rows = static_cast<Index>(window.input[1]), columns = static_cast<Index>(window.input[2]);
    const Index groups = static_cast<Index>(window.groups);
#pragma unroll 1
    for (Index d = depth.begin; d < depth.end; ++d) {
        const Index kd = d - depth.origin;
#pragma unroll 1
        for (Index h = height.begin; h < height.end; ++h) {
            const Index kh = h - height.origin;
            const bool inside = kd < window.kernel[0] && kh < window.kernel[1];
            const int row =
                (static_cast<int>(kd) * window.kernel[1] + static_cast<int>(kh)) * window.kernel[2];
            Index index = ((d * rows + h) * columns + width.begin) * groups + output.group;
#pragma unroll 1
            for (Index w = width.begin; w < width.end; ++w, index += groups) {
                const int kw = static_cast<int>(w - width.origin);
                visit(inside && kw < window.kernel[2] ? row + kw : -1, index);
            }
        }
    }
}

// Vectors of an image of inputs, and of outputs.
__device__ __forceinline__ long long input_image(const PoolWindow& window) {
    return window.input[0] * window.input[1] * window.input[2] * window.groups;
}
__device__ __forceinline__ long long output_image(const PoolWindow& window) {
    return window.output[0] * window.output[1] * window.output[2] * window.groups;
}
