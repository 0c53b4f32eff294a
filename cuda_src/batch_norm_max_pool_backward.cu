// The backward of batch_norm_max_pool.cu: that of batch norm, which gathers the gradient of each of its
// outputs from the windows that chose it. No gradient of batch norm's output is written.
//
// A gathered gradient is rounded to T, as max_pool_backward would write it: all results are those of the two
// in a row, to the last bit.
//
// Windows are over height and width, at most two of them over an input along either: kernel <= 2 * stride,
// without dilation. Arguments are those of batch_norm.cu and batch_norm_persistent.cu, and
//   dy, argmax   [images, output, groups] of Width T, and of one byte; aligned to 16 bytes
//   window       of max_pool.cu; units are vectors of x, of rows that are read twice squares of them; all
//                images have fewer than 2^31 vectors
#include "argmax.cuh"
#include "batch_norm_persistent.cuh"
#include "pool_window.cuh"
#include "pooled_bands.cuh"

// Vector number `unit` of x: its image, and its place there.
struct InputPlace {
    int image, row, column, group;

    __device__ __forceinline__ InputPlace(const PoolWindow& window, int unit) {
        // What is divided by fits into 32 bits, too.
        image = window.by_image.quotient(unit);
        const int rest = unit - image * static_cast<int>(window.by_image.divisor);
        const int place = window.by_groups.quotient(rest);
        group = rest - place * static_cast<int>(window.by_groups.divisor);
        row = window.by_units[2].quotient(place);
        column = place - row * static_cast<int>(window.by_units[2].divisor);
    }
};

// The windows over an input along one axis: `last` by tap `tap`, the one before it by tap + stride.
struct TwoWindows {
    int last, tap;
    bool by_last, by_other;

    //   padded   place of the input, counted from where the first window begins
    //   number   padded / stride
    __device__ __forceinline__ TwoWindows(int padded, int kernel, int stride, int number, int outputs)
        : last(number), tap(padded - number * stride) {
        by_last = last < outputs && tap < kernel;
        by_other = last > 0 && last <= outputs && tap + stride < kernel;
    }
    __device__ __forceinline__ bool covers(int back) const { return back == 0 ? by_last : by_other; }
};

// A source of gradients, see batch_norm_backward.cuh.
//   Window   of planes: kernel, stride and padding, along both
template <typename T, typename Layout, int... Window>
struct PooledGradient;

// Rows, of any such window.
template <typename T, int Width>
struct PooledGradient<T, NhwcLayout<Width>> {
    static constexpr bool kWhole = true, kIsArray = false, kIsKept = false;
    __device__ __forceinline__ const T* array() const { return nullptr; }

    // Of window 2 * i + j: i back in height, j back in width, so that taps ascend.
    struct Loaded {
        Vector<T, Width> gradients[4];
        Vector<unsigned char, Width> argmax[4];
        int tap;  // of window 0, by which it covers the input
        bool covers[4];
    };

    const T* dy;
    const unsigned char* argmax;
    const PoolWindow& window;

    __device__ __forceinline__ Loaded load(long long i) const {
        const InputPlace place(window, static_cast<int>(static_cast<unsigned long long>(i) / Width));
        const TwoWindows rows = along(1, place.row), columns = along(2, place.column);
        const int height = static_cast<int>(window.output[1]), width = static_cast<int>(window.output[2]);
        const int groups = static_cast<int>(window.groups);
        const int vector = ((place.image * height + rows.last) * width + columns.last) * groups + place.group;
        Loaded loaded;
        loaded.tap = rows.tap * window.kernel[2] + columns.tap;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int back = n / 2, beside = n % 2;
            loaded.covers[n] = rows.covers(back) && columns.covers(beside);
            if (!loaded.covers[n]) continue;
            const long long first = static_cast<long long>(vector - (back * width + beside) * groups) * Width;
            loaded.gradients[n] = Vector<T, Width>::load(dy + first);
            loaded.argmax[n] = Vector<unsigned char, Width>::load(argmax + first);
        }
        return loaded;
    }

    __device__ __forceinline__ Vector<T, Width> of(const Loaded& loaded) const {
        using A = accumulate_t<T>;
        A sum[Width] = {};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            if (!loaded.covers[n]) continue;
            const int tap =
                loaded.tap + n / 2 * window.stride[1] * window.kernel[2] + n % 2 * window.stride[2];
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                if (is_repeated_tap(loaded.argmax[n], k, repeated_tap(tap)))
                    sum[k] += widened(loaded.gradients[n], k);
            }
        }
        return rounded<T>(sum);
    }

    __device__ __forceinline__ TwoWindows along(int axis, int at) const {
        const int padded = at + window.pad[axis];
        return {padded, window.kernel[axis], window.stride[axis], window.by_stride[axis].quotient(padded),
                static_cast<int>(window.output[axis])};
    }
};

// Planes, whose rows are whole vectors, and as many outputs as these have windows of their own: for common
// windows, so that what a vector takes from which window is known when compiled.
template <typename T, int Kernel, int Stride, int Pad>
struct PooledGradient<T, NchwLayout, Kernel, Stride, Pad> {
    static constexpr bool kWhole = true, kIsArray = false, kIsKept = true;
    __device__ __forceinline__ const T* array() const { return nullptr; }
    static constexpr int kWidth = kVectorWidth<T>;
    // Windows of a vector's own, and those further on that reach into it.
    static constexpr int kOwn = kWidth / Stride, kMore = (Stride - 1 + Pad) / Stride;
    static_assert(Kernel - 1 - Pad < Stride && kMore <= 1 && Kernel <= 2 * Stride && kWidth % Stride == 0,
                  "no window before its own reaches a vector, and one after them at most");
    static constexpr int kRows = Kernel > Stride ? 2 : 1;

    static __device__ __forceinline__ Vector<unsigned char, kOwn> no_taps() {
        Vector<unsigned char, kOwn> taps;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) taps[j] = 0xff;
        return taps;
    }

    struct Loaded {
        Vector<T, kOwn> gradients[kRows];
        Vector<unsigned char, kOwn> argmax[kRows];
        T more_gradients[kRows];
        int more_argmax[kRows];
        int tap[kRows];  // the first of those by which they cover the vector's row; negative: they do not
    };

    const T* dy;
    const unsigned char* argmax;
    const PoolWindow& window;

    __device__ __forceinline__ Loaded load(long long i) const {
        const InputPlace place(window, static_cast<int>(static_cast<unsigned long long>(i) / kWidth));
        const int height = static_cast<int>(window.output[1]), width = static_cast<int>(window.output[2]);
        const int padded = place.row + Pad;
        const TwoWindows rows(padded, Kernel, Stride, static_cast<unsigned int>(padded) / Stride, height);
        const int column = place.column * kOwn;
        // In vectors, which can be counted in 32 bits.
        const int vector = (place.image * height + rows.last) * (width / kOwn) + place.column;
        Loaded loaded;
#pragma unroll
        for (int back = 0; back < kRows; ++back) {
            loaded.tap[back] = -1;
            loaded.more_argmax[back] = -1;
            if (!rows.covers(back)) continue;
            loaded.tap[back] = (rows.tap + back * Stride) * Kernel;
            const long long first = static_cast<long long>(vector - back * (width / kOwn)) * kOwn;
            loaded.gradients[back] = Vector<T, kOwn>::load(dy + first);
            loaded.argmax[back] = Vector<unsigned char, kOwn>::load(argmax + first);
            if (kMore > 0 && column + kOwn < width) {
                loaded.more_gradients[back] = dy[first + kOwn];
                loaded.more_argmax[back] = argmax[first + kOwn];
            }
        }
        return loaded;
    }

    __device__ __forceinline__ Vector<T, kWidth> of(const Loaded& loaded) const {
        using A = accumulate_t<T>;
        A sum[kWidth] = {};
#pragma unroll
        for (int back = 0; back < kRows; ++back) {
            if (loaded.tap[back] < 0) continue;
            add_windows(loaded.gradients[back], loaded.argmax[back], loaded.more_gradients[back],
                        loaded.more_argmax[back], loaded.tap[back], sum);
        }
        return rounded<T>(sum);
    }

    // Those of the vectors that a block has, in the slots where SharedCache looks for them: each is gathered
    // by the thread that has its column of Stride rows, which are under the same windows.
    __device__ __forceinline__ void fill(const NchwLayout& layout, long long channel, long long rank,
                                         uint4* slots) const {
        const int row_vectors = static_cast<int>(window.units[2]);
        const int threads = static_cast<int>(blockDim.x), shift = __ffs(threads) - 1;
        const long long begin = rank * layout.chunks_per_block;
        const long long end = min(begin + layout.chunks_per_block, layout.chunks);
        // Vectors of a whole chunk, and of the last one of a plane, which may be shorter; and the slots of
        // this thread's chunks before this one.
        const int whole = static_cast<int>(layout.chunk) / kWidth;
        const int last =
            static_cast<int>(layout.plane - (layout.chunks_per_plane - 1) * layout.chunk) / kWidth;
        int slots_before = 0;
#pragma unroll 1
        for (long long s = begin + threadIdx.y; s < end; s += blockDim.y) {
            const long long sample = layout.chunks_per_plane == 1 ? s : s / layout.chunks_per_plane;
            const int piece = static_cast<int>(s - sample * layout.chunks_per_plane);
            const bool is_last = piece + 1 == layout.chunks_per_plane;
            const int first = piece * whole, vectors = is_last ? last : whole;
            const int first_block = first / row_vectors / Stride;
            const int end_block = (first + vectors - 1) / row_vectors / Stride + 1;
            const int image = static_cast<int>(sample * layout.channels + channel);
            const int units = (end_block - first_block) * row_vectors;
#pragma unroll 1
            for (int first_unit = threadIdx.x; first_unit < units; first_unit += kFilled * threads) {
                UnderBlock under[kFilled];
#pragma unroll
                for (int u = 0; u < kFilled; ++u)
                    under[u] =
                        load_block(image, first_block, min(first_unit + u * threads, units - 1), row_vectors);
#pragma unroll
                for (int u = 0; u < kFilled; ++u) {
#pragma unroll
                    for (int r = 0; r < Stride; ++r) {
                        const Vector<T, kWidth> gathered = row_of(under[u], r);
                        const int vector = under[u].first + r * row_vectors - first;
                        if (first_unit + u * threads >= units || vector < 0 || vector >= vectors) continue;
                        const int owner = vector & (threads - 1);
                        const int slot = slots_before + (vector >> shift);
                        slots[slot * kChannelThreads + threadIdx.y * threads + owner] = gathered.words[0];
                    }
                }
            }
            slots_before += (vectors + threads - 1) >> shift;
        }
    }

  private:
    // Units that a thread of fill has in flight.
    static constexpr int kFilled = 2;
    // The windows over Stride rows of a vector: a row of them, and those below that reach into these.
    static constexpr int kOver = 1 + kMore;
    struct UnderBlock {
        Vector<T, kOwn> gradients[kOver];
        Vector<unsigned char, kOwn> argmax[kOver];
        T more_gradients[kOver];
        int more_argmax[kOver];
        int first;  // of its vectors, in the plane
    };

    __device__ __forceinline__ UnderBlock load_block(int image, int first_block, int unit,
                                                     int row_vectors) const {
        const int height = static_cast<int>(window.output[1]);
        const int below = window.by_units[2].quotient(unit), column = unit - below * row_vectors;
        const int row = first_block + below;
        UnderBlock under;
        under.first = row * Stride * row_vectors + column;
#pragma unroll
        for (int i = 0; i < kOver; ++i) {
            // Where there is no window another one is read, and none of its taps taken.
            const bool inside = row + i < height, has_more = column + 1 < row_vectors;
            const int of_image = image * height + min(row + i, height - 1);
            const long long first = static_cast<long long>(of_image * row_vectors + column) * kOwn;
            under.gradients[i] = Vector<T, kOwn>::load(dy + first);
            under.argmax[i] = Vector<unsigned char, kOwn>::load(argmax + first);
            if (!inside) under.argmax[i] = no_taps();
            under.more_gradients[i] = from_accumulate<T>(0);
            under.more_argmax[i] = -1;
            if (kMore > 0 && has_more && inside) {
                under.more_gradients[i] = dy[first + kOwn];
                under.more_argmax[i] = argmax[first + kOwn];
            }
        }
        return under;
    }

    // What its row r takes from them.
    __device__ __forceinline__ Vector<T, kWidth> row_of(const UnderBlock& under, int r) const {
        using A = accumulate_t<T>;
        A sum[kWidth] = {};
#pragma unroll
        for (int i = (r + Pad) / Stride; i >= 0; --i) {
            const int kh = r + Pad - i * Stride;
            if (kh >= Kernel) continue;
            // The number of columns is Kernel, which the compiler must not know: it would compare bytes one
            // by one.
            add_windows(under.gradients[i], under.argmax[i], under.more_gradients[i], under.more_argmax[i],
                        kh * window.kernel[2], sum);
        }
        return rounded<T>(sum);
    }

    // Adds what a row of windows gives to a vector, from the last window to the first, whose taps ascend.
    //   tap   the first of those by which they cover the vector's row
    static __device__ __forceinline__ void add_windows(const Vector<T, kOwn>& gradients,
                                                       const Vector<unsigned char, kOwn>& argmax,
                                                       T more_gradient, int more_argmax, int tap,
                                                       accumulate_t<T> (&sum)[kWidth]) {
        using A = accumulate_t<T>;
#pragma unroll
        for (int j = kOwn + kMore - 1; j >= 0; --j) {
            const bool own = j < kOwn;
            const A gradient = own ? widened(gradients, j % kOwn) : to_accumulate(more_gradient);
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
                const int kw = k + Pad - j * Stride;
                if (kw < 0 || kw >= Kernel) continue;
                const bool chosen =
                    own ? is_repeated_tap(argmax, j % kOwn, repeated_tap(tap + kw)) : more_argmax == tap + kw;
                if (chosen) sum[k] += gradient;
            }
        }
    }
};

// ---- two reads --------------------------------------------------------------------------------------------
//
// Launch: of rows with shared memory for BandGradients.

// f(gradient), with the source of gradients in either layout.
template <typename Layout, int... Window, typename T, typename Function>
__device__ __forceinline__ void with_pooled_gradient(const T* dy, const unsigned char* argmax, const T* x,
                                                     int activation, const PoolWindow& window, Function f) {
    constexpr int kWidth = kLayoutWidth<T, Layout>;
    if constexpr (Layout::kIsNchw) {
        using Source = PooledGradient<T, Layout, Window...>;
        f(GradientBeforeActivation<T, kWidth, kClipping, Source>{
            {dy, argmax, window}, x, nullptr, activation});
    } else {
        using Source = BandGradients<T, kWidth, Window...>;
        DYNAMIC_SHARED(slots);
        BandWalk walk;
        f(GradientBeforeActivation<T, kWidth, kClipping, Source>{
            {dy, argmax, window, slots, x, walk}, x, nullptr, activation});
    }
}

template <typename T, typename Layout, int... Window>
__global__ void __launch_bounds__(kChannelThreads, kLayoutBlocks<Layout, kClipping>)
    batch_norm_max_pool_gradient_sums(const T* dy, const unsigned char* argmax, const T* x,
                                      const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                                      const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                      int activation, accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                      accumulate_t<T>* dbeta, PoolWindow window, Layout layout) {
    constexpr int kLoads = Layout::kIsNchw ? 1 : kSumLoads<Layout, kClipping>;
    with_pooled_gradient<Layout, Window...>(dy, argmax, x, activation, window, [&](const auto& gradient) {
        sum_gradients<T, kClipping, kLoads>(gradient, {mean, inv_std, gamma, beta},
                                            {partial_sums, inv_std, dgamma, dbeta}, layout);
    });
}

template <typename T, typename Layout, int... Window>
__global__ void __launch_bounds__(kChannelThreads, kLayoutBlocks<Layout, kClipping>)
    batch_norm_max_pool_input_gradient(const T* dy, const unsigned char* argmax, const T* x,
                                       const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                                       const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                       int activation, const accumulate_t<T>* dgamma,
                                       const accumulate_t<T>* dbeta, T* dx, accumulate_t<T> inv_count,
                                       PoolWindow window, Layout layout) {
    with_pooled_gradient<Layout, Window...>(dy, argmax, x, activation, window, [&](const auto& gradient) {
        find_input_gradients<T, kClipping>(gradient, {mean, inv_std, gamma, beta}, dgamma, dbeta, dx,
                                           static_cast<T*>(nullptr), inv_count, layout);
    });
}

// ---- one read --------------------------------------------------------------------------------------------

template <typename T, typename Layout, int... Window>
__global__ void __launch_bounds__(kChannelThreads, kPersistentBlocks)
    batch_norm_max_pool_backward_persistent(const T* dy, const unsigned char* argmax, const T* x,
                                            const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                                            const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                            int activation, accumulate_t<T>* partial_sums,
                                            accumulate_t<T>* dgamma, accumulate_t<T>* dbeta, T* dx,
                                            unsigned int* barrier_count, accumulate_t<T> inv_count,
                                            int slots_of_x, PoolWindow window, Layout layout) {
    DYNAMIC_SHARED(slots);
    backward_persistent<T, kClipping, PooledGradient<T, Layout, Window...>>(
        {dy, argmax, window}, x, {mean, inv_std, gamma, beta}, nullptr, activation,
        {partial_sums, inv_std, dgamma, dbeta}, dx, nullptr, barrier_count, inv_count, slots_of_x, slots,
        layout);
}
