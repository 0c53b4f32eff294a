// How a block walks over the values of its channel, or channels.
//
// Planes: (batch, channels, plane), the values of a channel are `batch` runs of `plane` neighbours. A block
// has one channel and a part of its segments: a segment is a run, or a piece of a long one. Rows: (rows,
// channels), a value of every channel in each row. A block has a tile of channels, a vector of neighbours for
// each thread along x, and a part of the rows.
#pragma once

#include "vector_io.cuh"

constexpr int kChannelThreads = 256;
// Loads in flight for each thread of the inner loops.
constexpr int kChannelUnroll = 4;

struct PlaneLayout {
    long long channels;
    long long plane;               // values of a channel in one sample
    long long segment;             // values of a segment at most; a multiple of the vector width
    long long segments_per_plane;  // ceil(plane / segment)
    long long segments;            // of a channel: batch * segments_per_plane
    long long segments_per_part;   // of a block
    long long parts;               // blocks of a channel
};

static_assert(sizeof(PlaneLayout) == 56, "the launcher packs it with this size");

struct RowLayout {
    long long rows;
    long long channels;
    long long tiles;          // blocks side by side, to cover the channels
    long long rows_per_part;  // of a block
    long long parts;          // blocks of a tile
};
static_assert(sizeof(RowLayout) == 40, "the launcher packs it with this size");

// Calls body for all values of channel `channel` in part `part`: body.vector(i) for whole aligned vectors of
// kChannelUnroll x width neighbours, body.scalar(i) for the others; i is the index in the array.
//   Launch: threads x walk along a segment, threads y take segments in turn.
template <typename T, typename Body>
__device__ __forceinline__ void for_each_in_plane_part(const PlaneLayout& layout, long long channel,
                                                       long long part, Body& body) {
    constexpr int width = kVectorWidth<T>;
    const long long begin = part * layout.segments_per_part;
    const long long end = min(begin + layout.segments_per_part, layout.segments);
#pragma unroll 1
    for (long long s = begin + threadIdx.y; s < end; s += blockDim.y) {
        const long long sample = s / layout.segments_per_plane;
        const long long first = (s - sample * layout.segments_per_plane) * layout.segment;
        const long long base = (sample * layout.channels + channel) * layout.plane + first;
        const int length = static_cast<int>(min(layout.segment, layout.plane - first));
        // Planes of an odd size start anywhere: up to the first whole vector, and after the last, one by one.
        const int head = min(length, static_cast<int>((width - base % width) % width));
        const int vectors = (length - head) / width;
        const int tail = head + vectors * width;
#pragma unroll 1
        for (int i = threadIdx.x; i < head; i += blockDim.x) body.scalar(base + i);
        int v = threadIdx.x;
#pragma unroll 1
        for (; v + (kChannelUnroll - 1) * static_cast<int>(blockDim.x) < vectors;
             v += kChannelUnroll * blockDim.x) {
            body.template vectors<kChannelUnroll>(base + head + static_cast<long long>(v) * width,
                                                  static_cast<long long>(blockDim.x) * width);
        }
#pragma unroll 1
        for (; v < vectors; v += blockDim.x) {
            body.template vectors<1>(base + head + static_cast<long long>(v) * width, 0);
        }
#pragma unroll 1
        for (int i = tail + threadIdx.x; i < length; i += blockDim.x) body.scalar(base + i);
    }
}

// Calls body.vectors<Count>(i, stride) for this thread's Width channels in all rows of part `part`: Count
// rows at once, at i, i + stride, ...; i is the index in the array of the first channel.
//   channel   first channel of this thread; the caller has checked that it exists
//   Launch: threads x stand side by side over channels, threads y take rows in turn.
template <typename Body>
__device__ __forceinline__ void for_each_in_row_part(const RowLayout& layout, long long channel,
                                                     long long part, Body& body) {
    const long long end = min((part + 1) * layout.rows_per_part, layout.rows);
    const long long stride = blockDim.y * layout.channels;
    long long row = part * layout.rows_per_part + threadIdx.y;
#pragma unroll 1
    for (; row + (kChannelUnroll - 1) * static_cast<long long>(blockDim.y) < end;
         row += kChannelUnroll * blockDim.y) {
        body.template vectors<kChannelUnroll>(row * layout.channels + channel, stride);
    }
#pragma unroll 1
    for (; row < end; row += blockDim.y) body.template vectors<1>(row * layout.channels + channel, 0);
}
