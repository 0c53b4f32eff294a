// The window of a pooling kernel, and which element a thread has.
//
// All ranks are three-dimensional (depth, height, width; missing axes have size 1). Both layouts are one: an
// image is (depth, height, width, groups) where a group is a vector of Width channels, for channels last; and
// (depth, height, width, 1) of single values, an image being a plane, for channels first.
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
    long long input[3], output[3];
    long long images;  // samples, or planes
    long long groups;  // vectors side by side at each position
    // Of indices, by the sizes; by the vectors of an output and an input image, where those are below 2^31.
    Divisor32 by_output[3], by_input[3], by_output_image, by_input_image, by_groups, by_stride[3];
};

static_assert(sizeof(PoolWindow) == 256, "the launcher packs it with this size");

// Which of the two arrays a thread has an element of.
template <bool IsOutput>
struct PoolSide {
    static __device__ __forceinline__ long long size(const PoolWindow& window, int axis) {
        return IsOutput ? window.output[axis] : window.input[axis];
    }
    static __device__ __forceinline__ const Divisor32 (&by_sizes(const PoolWindow& window))[3] {
        return IsOutput ? window.by_output : window.by_input;
    }
    static __device__ __forceinline__ const Divisor32& by_image(const PoolWindow& window) {
        return IsOutput ? window.by_output_image : window.by_input_image;
    }
    // Vectors of an image.
    static __device__ __forceinline__ long long image_size(const PoolWindow& window) {
        return size(window, 0) * size(window, 1) * size(window, 2) * window.groups;
    }
};
using PoolOutput = PoolSide<true>;
using PoolInput = PoolSide<false>;

// The windows over one input element along one axis: outputs last, last - 1, ..., first.
template <typename Index>
struct CoveringWindows {
    Index first, last;
};

// Sizes known when the kernel is compiled, dilation 1.
template <int KernelD, int KernelH, int KernelW, int StrideD, int StrideH, int StrideW>
struct StaticWindow {
    // Loops over taps are unrolled as a whole.
    static constexpr int kUnroll = 16;
    static __device__ __forceinline__ constexpr int kernel(const PoolWindow&, int axis) {
        return axis == 0 ? KernelD : axis == 1 ? KernelH : KernelW;
    }
    static __device__ __forceinline__ constexpr int stride(const PoolWindow&, int axis) {
        return axis == 0 ? StrideD : axis == 1 ? StrideH : StrideW;
    }
    static __device__ __forceinline__ constexpr int dilation(const PoolWindow&, int) { return 1; }
    // Windows over an element along one axis, at most.
    template <typename Index>
    static __device__ __forceinline__ constexpr int covering(const CoveringWindows<Index>&, int axis) {
        return axis == 0   ? (KernelD + StrideD - 1) / StrideD
               : axis == 1 ? (KernelH + StrideH - 1) / StrideH
                           : (KernelW + StrideW - 1) / StrideW;
    }
    template <typename Index>
    static __device__ __forceinline__ Index divided_by_stride(const PoolWindow& window, int axis,
                                                              Index index) {
        return index / stride(window, axis);
    }
};

// Sizes known when it is launched.
struct DynamicWindow {
    static constexpr int kUnroll = 1;
    static __device__ __forceinline__ int kernel(const PoolWindow& window, int axis) {
        return window.kernel[axis];
    }
    static __device__ __forceinline__ int stride(const PoolWindow& window, int axis) {
        return window.stride[axis];
    }
    static __device__ __forceinline__ int dilation(const PoolWindow& window, int axis) {
        return window.dilation[axis];
    }
    template <typename Index>
    static __device__ __forceinline__ int covering(const CoveringWindows<Index>& windows, int) {
        return static_cast<int>(windows.last - windows.first) + 1;
    }
    template <typename Index>
    static __device__ __forceinline__ Index divided_by_stride(const PoolWindow& window, int axis,
                                                              Index index) {
        return quotient(index, window.by_stride[axis], window.stride[axis]);
    }
};

// Position of a vector in an array of images.
template <typename Index>
struct PoolPosition {
    long long image;
    Index at[3];
    Index group;
};

// Position of vector number `first + step` of all images of a side.
//   first   of the block, so that the 64-bit division is the same for all of its threads
//   step    of the thread, below kPoolThreads
template <typename Side, typename Index>
__device__ __forceinline__ PoolPosition<Index> pool_position(const PoolWindow& window, long long first,
                                                             int step) {
    const long long size = Side::image_size(window);
    const Divisor32(&by_sizes)[3] = Side::by_sizes(window);
    PoolPosition<Index> position;
    position.image = first / size;
    // Below size + kPoolThreads: the thread may be in a later image than the block's first vector.
    Index rest = static_cast<Index>(first - position.image * size) + step;
    const Index later = quotient(rest, Side::by_image(window), size);
    position.image += later;
    rest -= later * static_cast<Index>(size);
    const Index place = quotient(rest, window.by_groups, window.groups);
    position.group = rest - place * static_cast<Index>(window.groups);
    const Index height = static_cast<Index>(Side::size(window, 1)),
                width = static_cast<Index>(Side::size(window, 2));
    const Index row = quotient(place, by_sizes[2], width);
    position.at[2] = place - row * width;
    position.at[0] = quotient(row, by_sizes[1], height);
    position.at[1] = row - position.at[0] * height;
    return position;
}

// Calls visit(tap, index) for the window's taps inside the input, in order; index is that of the vector
// within its image.
template <typename Window, typename Index, typename Visit>
__device__ __forceinline__ void for_each_tap(const PoolWindow& window, const PoolPosition<Index>& output,
                                             Visit visit) {
    Index origin[3], size[3];
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
        origin[axis] = output.at[axis] * Window::stride(window, axis) - window.pad[axis];
        size[axis] = static_cast<Index>(window.input[axis]);
    }
    int tap = 0;
#pragma unroll(Window::kUnroll)
    for (int kd = 0; kd < Window::kernel(window, 0); ++kd) {
        const Index d = origin[0] + kd * Window::dilation(window, 0);
#pragma unroll(Window::kUnroll)
        for (int kh = 0; kh < Window::kernel(window, 1); ++kh) {
            const Index h = origin[1] + kh * Window::dilation(window, 1);
            const bool row_inside = d >= 0 && d < size[0] && h >= 0 && h < size[1];
            const Index row = (d * size[1] + h) * size[2];
#pragma unroll(Window::kUnroll)
            for (int kw = 0; kw < Window::kernel(window, 2); ++kw, ++tap) {
                const Index w = origin[2] + kw * Window::dilation(window, 2);
                if (row_inside && w >= 0 && w < size[2])
                    visit(tap, (row + w) * static_cast<Index>(window.groups) + output.group);
            }
        }
    }
}

template <typename Window, typename Index>
__device__ __forceinline__ CoveringWindows<Index> covering_windows(const PoolWindow& window, int axis,
                                                                   Index at) {
    const Index padded = at + window.pad[axis];
    const Index reach = padded - (Window::kernel(window, axis) - 1) * Window::dilation(window, axis);
    const int stride = Window::stride(window, axis);
    const Index last = Window::divided_by_stride(window, axis, padded);
    return {reach <= 0 ? Index(0) : Window::divided_by_stride(window, axis, reach + stride - 1),
            min(last, static_cast<Index>(window.output[axis]) - 1)};
}

// Tap along one axis by which the window at `output` covers the element at `at`; negative if it skips it
// (dilation).
template <typename Window, typename Index>
__device__ __forceinline__ int covering_tap(const PoolWindow& window, int axis, Index at, Index output) {
    const int distance = static_cast<int>(at + window.pad[axis] - output * Window::stride(window, axis));
    const int dilation = Window::dilation(window, axis);
    if (dilation == 1) return distance;
    const int tap = distance / dilation;
    return tap * dilation == distance ? tap : -1;
}

// Calls visit(tap, index, output) for the windows over an input element, in ascending order of the tap; index
// is that of the output vector within its image, output its place along the three axes.
template <typename Window, typename Index, typename Visit>
__device__ __forceinline__ void for_each_covering_window(const PoolWindow& window,
                                                         const PoolPosition<Index>& input, Visit visit) {
    const CoveringWindows<Index> depth = covering_windows<Window>(window, 0, input.at[0]);
    const CoveringWindows<Index> height = covering_windows<Window>(window, 1, input.at[1]);
    const CoveringWindows<Index> width = covering_windows<Window>(window, 2, input.at[2]);
    // Counted from the last one, so that a static window's loops have a known length and are unrolled.
#pragma unroll(Window::kUnroll)
    for (int i = 0; i < Window::covering(depth, 0); ++i) {
        const Index d = depth.last - i;
        const int kd = covering_tap<Window>(window, 0, input.at[0], d);
#pragma unroll(Window::kUnroll)
        for (int j = 0; j < Window::covering(height, 1); ++j) {
            const Index h = height.last - j;
            const int kh = covering_tap<Window>(window, 1, input.at[1], h);
            const bool row_covers = d >= depth.first && kd >= 0 && h >= height.first && kh >= 0;
            const Index row =
                (d * static_cast<Index>(window.output[1]) + h) * static_cast<Index>(window.output[2]);
#pragma unroll(Window::kUnroll)
            for (int k = 0; k < Window::covering(width, 2); ++k) {
                const Index w = width.last - k;
                const int kw = covering_tap<Window>(window, 2, input.at[2], w);
                if (!row_covers || w < width.first || kw < 0) continue;
                const int tap = (kd * Window::kernel(window, 1) + kh) * Window::kernel(window, 2) + kw;
                const Index output[3] = {d, h, w};
                visit(tap, (row + w) * static_cast<Index>(window.groups) + input.group, output);
            }
        }
    }
}
