// Boxes of planes, which a block has one after another: so many neighbours that what they share pays.
//
//   for (unsigned long long number = blockIdx.x; number < boxes.number; number += gridDim.x) {
//       const PoolBox box(boxes, number);
//       ...                        // all threads fill the box in shared memory, each for its plane box.own
//       write_box(boxes, box, made, dx);
//   }
#pragma once

#include "division64.cuh"
#include "vector_io.cuh"

constexpr int kBoxBytes = 24 * 1024;  // of a box in shared memory

struct PoolBoxes {
    Divisor64 along[3], groups;  // boxes along each axis, groups of the planes of an image
    int size[3];                 // of a plane
    int box[3];                  // sizes
    int log2_group;              // planes of a block
    int log2_columns;            // columns that its workers take side by side, see PoolColumns
    int channels_last;
    unsigned long long number;   // of boxes
    long long images, channels;  // where channels are not last, all planes are of one image
};
static_assert(sizeof(PoolBoxes) == 160, "the launcher packs it with this size");

// A box of some planes, and which of them a thread has. Launch: 1-D, a power of two.
struct PoolBox {
    long long image, first;  // planes first .. first + planes - 1 of the image
    int planes;
    int from[3], to[3];
    int own, worker, workers;  // the thread's plane, where it is one of so many

    __device__ __forceinline__ PoolBox(const PoolBoxes& boxes, unsigned long long number) {
#pragma unroll
        for (int axis = 2; axis >= 0; --axis) {
            from[axis] = 0;
            if (boxes.along[axis].divisor > 1) {
                const unsigned long long rest = boxes.along[axis].quotient(number);
                from[axis] = static_cast<int>(number - rest * boxes.along[axis].divisor) * boxes.box[axis];
                number = rest;
            }
            to[axis] = min(from[axis] + boxes.box[axis], boxes.size[axis]);
        }
        const unsigned long long whole = boxes.groups.quotient(number);
        image = static_cast<long long>(whole);
        first = static_cast<long long>(number - whole * boxes.groups.divisor) << boxes.log2_group;
        planes = static_cast<int>(min(boxes.channels - first, 1ll << boxes.log2_group));
        const int log2_workers = __ffs(static_cast<int>(blockDim.x)) - 1 - boxes.log2_group;
        workers = 1 << log2_workers;
        const int thread = threadIdx.x;
        own = boxes.channels_last != 0 ? thread & ((1 << boxes.log2_group) - 1) : thread >> log2_workers;
        worker = boxes.channels_last != 0 ? thread >> boxes.log2_group : thread & (workers - 1);
    }
    // First element of one of the planes in an array whose planes have this size.
    __device__ __forceinline__ long long before(const PoolBoxes& boxes, const int (&size)[3],
                                                int plane) const {
        const long long places = static_cast<long long>(size[0]) * size[1] * size[2];
        const long long number = first + plane;
        return boxes.channels_last != 0 ? image * places * boxes.channels + number : number * places;
    }
    // Whether a box is of whole rows: one line, of the planes too unless these are side by side.
    __device__ __forceinline__ bool is_line(const PoolBoxes& boxes) const {
        return to[2] - from[2] == boxes.size[2];
    }
    // Whether it is of whole vectors.
    //   start   its first element
    template <int Width>
    __device__ __forceinline__ bool is_of_vectors(const PoolBoxes& boxes, long long start) const {
        if (boxes.channels_last != 0) return boxes.channels % Width == 0 && 1 << boxes.log2_group >= Width;
        const int columns = to[2] - from[2];
        const int places = (to[0] - from[0]) * (to[1] - from[1]) * columns * planes;
        const bool whole =
            is_line(boxes) ? places % Width == 0 : columns % Width + boxes.size[2] % Width == 0;
        return whole && start % Width == 0;
    }
};

// Number of a place in a plane.
template <typename Index>
__device__ __forceinline__ Index place_of(const int (&size)[3], int d, int h, int w) {
    return (static_cast<Index>(d) * size[1] + h) * size[2] + w;
}

// Columns that a worker takes one after another, and of each some rows: what belongs to a column is found
// once.
//   const PoolColumns own(boxes, box);
//   for (int w = own.column; w < columns; w += own.columns)
//       for (int h = own.row; h < rows; h += own.rows) ...
struct PoolColumns {
    int column, columns, row, rows;

    __device__ __forceinline__ PoolColumns(const PoolBoxes& boxes, const PoolBox& box)
        : column(box.worker & ((1 << boxes.log2_columns) - 1)),
          columns(1 << boxes.log2_columns),
          row(box.worker >> boxes.log2_columns),
          rows(box.workers >> boxes.log2_columns) {}
};

// Rows and columns that a worker takes in turn.
struct PoolWalk {
    int row, column, columns, rows_on, columns_on;

    __device__ __forceinline__ PoolWalk(int columns, int worker, int workers)
        : row(worker / columns), columns(columns), rows_on(workers / columns) {
        column = worker - row * columns;
        columns_on = workers - rows_on * columns;
    }
    __device__ __forceinline__ void next() {
        row += rows_on;
        column += columns_on;
        if (column >= columns) column -= columns, ++row;
    }
};

// Writes a box from shared memory, where it has its planes side by side for channels last, else one after
// another: those are whole, if there are several.
//   made    aligned to 16 bytes
//   place   where the box begins
template <int Width, typename T>
__device__ __forceinline__ void write_vectors(const PoolBoxes& boxes, const PoolBox& box, const T* made,
                                              T* place) {
    const bool last = boxes.channels_last != 0;
    int lines = (box.to[0] - box.from[0]) * (box.to[1] - box.from[1]);
    int places = box.to[2] - box.from[2];
    if (box.is_line(boxes)) places *= last ? lines : lines * box.planes, lines = 1;
    // Vectors of a place, for channels last; else a vector is a place.
    const int log2_lanes = last ? boxes.log2_group - (Width == 1 ? 0 : __ffs(Width) - 1) : 0;
    const int lane = threadIdx.x & ((1 << log2_lanes) - 1);
    if (!last) places /= Width;
    if (last && lane * Width >= box.planes) return;
    const int first = threadIdx.x >> log2_lanes, threads = static_cast<int>(blockDim.x) >> log2_lanes;
    const long long step = last ? boxes.channels : Width;
    made += lane * Width;
    place += lane * Width;
    if (lines == 1) {
        made += (first << log2_lanes) * Width;
        place += first * step;
        for (int i = first; i < places; i += threads) {
            Vector<T, Width>::load(made).store(place);
            made += (threads << log2_lanes) * Width;
            place += threads * step;
        }
        return;
    }
    const long long line_step = last ? boxes.size[2] * step : boxes.size[2];
    PoolWalk walk(places, first, threads);
    for (; walk.row < lines; walk.next()) {
        const int at = (walk.row * places + walk.column) << log2_lanes;
        Vector<T, Width>::load(made + at * Width).store(place + walk.row * line_step + walk.column * step);
    }
}

template <typename T>
__device__ __forceinline__ void write_box(const PoolBoxes& boxes, const PoolBox& box, const T* made, T* dx) {
    const long long start = box.before(boxes, boxes.size, 0) +
                            place_of<long long>(boxes.size, box.from[0], box.from[1], box.from[2]) *
                                (boxes.channels_last != 0 ? boxes.channels : 1);
    if (box.is_of_vectors<kVectorWidth<T>>(boxes, start)) {
        write_vectors<kVectorWidth<T>>(boxes, box, made, dx + start);
    } else {
        write_vectors<1>(boxes, box, made, dx + start);
    }
}

// The same, for the threads to fill: nothing yet.
template <typename T>
__device__ __forceinline__ void clear_box(const PoolBoxes& boxes, const PoolBox& box, uint4* words) {
    const int size = (box.to[0] - box.from[0]) * (box.to[1] - box.from[1]) * (box.to[2] - box.from[2]);
    const int bytes = (size << boxes.log2_group) * static_cast<int>(sizeof(T));
    for (int i = threadIdx.x; i * kVectorBytes < bytes; i += blockDim.x) words[i] = make_uint4(0, 0, 0, 0);
}

// Where the places of the thread's plane are in a box.
//   const PlaneInBox own(boxes, box);
//   made[own.place(d, h, w)] = value;
struct PlaneInBox {
    // Modulo 2^32: what is before the box is not in it.
    unsigned int rows, columns, origin, log2_step;

    __device__ __forceinline__ PlaneInBox(const PoolBoxes& boxes, const PoolBox& box)
        : rows(box.to[1] - box.from[1]), columns(box.to[2] - box.from[2]), origin(0), log2_step(0) {
        unsigned int first = box.own;
        if (boxes.channels_last != 0) {
            log2_step = boxes.log2_group;
        } else {
            first *= (box.to[0] - box.from[0]) * rows * columns;
        }
        origin = first - place(box.from[0], box.from[1], box.from[2]);
    }
    __device__ __forceinline__ unsigned int place(int d, int h, int w) const {
        return origin + (((d * rows + h) * columns + w) << log2_step);
    }
};
