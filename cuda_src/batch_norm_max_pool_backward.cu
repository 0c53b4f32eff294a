// The backward of batch_norm_max_pool.cu: that of batch norm, which gathers the gradient of each of its
// outputs from the windows that chose it. No gradient of batch norm's output is written.
//
// A gathered gradient is rounded to T, as max_pool_backward would write it: all results are those of the two
// in a row, to the last bit.
//
// Windows are over height and width, at most two of them over an input along either: kernel <= 2 * stride,
// without dilation. Arguments are those of batch_norm.cu and batch_norm_persistent.cu, and
//   dy, argmax   [images, output, groups] of Width T, and of one byte; aligned to 16 bytes
//   window       of max_pool.cu; units are vectors of x, squares of inputs for the sums of rows, or strips of
//                tiles of inputs; all images have fewer than 2^31 vectors
//   strip        squares of inputs, one below the other, that a thread gathers
#include "argmax.cuh"
#include "batch_norm_persistent.cuh"
#include "pool_window.cuh"
#include "pooled_bands.cuh"
#include "window_gradients.cuh"

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
    int strip;  // not used: each vector is gathered where it is needed

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
    int strip;

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
    // by the thread that has its strip of rows, up which it takes each row of windows once.
    __device__ __forceinline__ void fill(const NchwLayout& layout, long long channel, long long rank,
                                         uint4* slots) const {
        using Tile = PoolTile<T, Kernel, Stride, Pad, false>;
        using Row = WindowRow<T, Tile, false>;
        using Sums = GatheredRow<T, Tile, false>;
        static_assert(Tile::kBody == kWidth && Tile::kFirst == 0, "a tile is over one vector");
        const int row_vectors = static_cast<int>(window.units[2]),
                  height = static_cast<int>(window.output[1]);
        const int width = row_vectors * kOwn;
        const int threads = static_cast<int>(blockDim.x), shift = __ffs(threads) - 1;
        int slots_before = 0;  // of this thread's chunks
        for_each_chunk(layout, channel, rank, [&](const Chunk& chunk) {
            const T* const image_dy = dy + chunk.image * (height * width);
            const unsigned char* const image_argmax = argmax + chunk.image * (height * width);
            uint4* const own =
                kept_pointer<true>(slots + slots_before * kChannelThreads + threadIdx.y * threads);
            const int units = (chunk.end - chunk.begin + strip - 1) / strip * row_vectors;
#pragma unroll 1
            for (int unit = threadIdx.x; unit < units; unit += threads) {
                const int below = window.by_units[2].quotient(unit), column = unit - below * row_vectors;
                const int begin = chunk.begin + below * strip, end = min(begin + strip, chunk.end);
                // One row ahead.
                const auto read = [&](int h) {
                    const int nearest = min(h, height - 1);
                    return Row::template read<true>(image_dy, image_argmax, nearest * width, column * kOwn,
                                                    width, 1, h == nearest);
                };
                auto next = read(end - 1 + Tile::kLast);
                gather_up<Tile, Sums>(
                    begin, end, static_cast<int>(window.input[1]),
                    [&](int h) {
                        const Row windows(next);
                        if (h > begin) next = read(h - 1);
                        return windows;
                    },
                    [&](const Row& windows, int i, int r, Sums& sums) { sums.add(windows, i, r, 0); },
                    [&](int row, int r, const Sums& sums) {
                        const int vector = row * row_vectors + column - chunk.first;
                        if (vector < 0 || vector >= chunk.vectors) return;
                        own[(vector >> shift) * (kChannelThreads - threads) + vector] = sums.row(r).words[0];
                    });
            }
            slots_before += (chunk.vectors + threads - 1) >> shift;
        });
    }

    // Asks for the windows of another channel, which fill() will read.
    __device__ __forceinline__ void ask(const NchwLayout& layout, long long channel, long long rank) const {
        const int width = static_cast<int>(window.output[2]);
        const int outputs = static_cast<int>(window.output[1]) * width;
        constexpr int kInSector = kSectorBytes / static_cast<int>(sizeof(T));
        for_each_chunk(layout, channel, rank, [&](const Chunk& chunk) {
            const int begin = chunk.begin * width, end = min((chunk.end + kMore) * width, outputs);
#pragma unroll 1
            for (int i = begin + static_cast<int>(threadIdx.x) * kInSector; i < end;
                 i += static_cast<int>(blockDim.x) * kInSector) {
                prefetch(dy + chunk.image * outputs + i);
                prefetch(argmax + chunk.image * outputs + i);
            }
        });
    }

  private:
    // Some vectors of an image, which is a plane, in its blocks begin .. end - 1 of Stride rows.
    struct Chunk {
        long long image;
        int first, vectors, begin, end;
    };

    // Calls visit(chunk) for those of a thread.
    template <typename Visit>
    __device__ __forceinline__ void for_each_chunk(const NchwLayout& layout, long long channel,
                                                   long long rank, Visit visit) const {
        const long long begin = rank * layout.chunks_per_block;
        const long long end = min(begin + layout.chunks_per_block, layout.chunks);
        const int row_vectors = static_cast<int>(window.units[2]);
        // Vectors of a whole chunk, and of the last one of a plane, which may be shorter.
        const int whole = static_cast<int>(layout.chunk) / kWidth;
        const int last =
            static_cast<int>(layout.plane - (layout.chunks_per_plane - 1) * layout.chunk) / kWidth;
#pragma unroll 1
        for (long long s = begin + threadIdx.y; s < end; s += blockDim.y) {
            const long long sample = layout.chunks_per_plane == 1 ? s : s / layout.chunks_per_plane;
            const int piece = static_cast<int>(s - sample * layout.chunks_per_plane);
            const int first = piece * whole, vectors = piece + 1 == layout.chunks_per_plane ? last : whole;
            visit(Chunk{sample * layout.channels + channel, first, vectors, first / row_vectors / Stride,
                        (first + vectors - 1) / row_vectors / Stride + 1});
        }
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
// Launch: of rows with shared memory for BandGradients, norms and slots.

// f(gradient), with the source of gradients in either layout.
template <typename Layout, int... Window, typename T, typename Function>
__device__ __forceinline__ void with_pooled_gradient(const T* dy, const unsigned char* argmax, const T* x,
                                                     int activation, int strip, const PoolWindow& window,
                                                     Function f) {
    constexpr int kWidth = kLayoutWidth<T, Layout>;
    if constexpr (Layout::kIsNchw) {
        using Source = PooledGradient<T, Layout, Window...>;
        f(GradientBeforeActivation<T, kWidth, kClipping, Source>{
            {dy, argmax, window, strip}, x, nullptr, activation});
    } else {
        using Source = BandGradients<T, kWidth, Window...>;
        DYNAMIC_SHARED(shared);
        auto* const norms = reinterpret_cast<Normalization<accumulate_t<T>>*>(shared);
        auto* const slots = reinterpret_cast<uint4*>(norms + blockDim.x * kWidth);
        BandWalk walk;
        f(GradientBeforeActivation<T, kWidth, kClipping, Source>{
            {dy, argmax, window, strip, norms, slots, x, walk}, x, nullptr, activation});
    }
}

template <typename T, typename Layout, int... Window>
__global__ void __launch_bounds__(kChannelThreads, kLayoutBlocks<Layout, kClipping>)
    batch_norm_max_pool_gradient_sums(const T* dy, const unsigned char* argmax, const T* x,
                                      const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                                      const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                      int activation, accumulate_t<T>* partial_sums, accumulate_t<T>* dgamma,
                                      accumulate_t<T>* dbeta, int strip, PoolWindow window, Layout layout) {
    constexpr int kLoads = Layout::kIsNchw ? 1 : kSumLoads<Layout, kClipping>;
    with_pooled_gradient<Layout, Window...>(
        dy, argmax, x, activation, strip, window, [&](const auto& gradient) {
            sum_gradients<T, kClipping, kLoads>(gradient, {mean, inv_std, gamma, beta},
                                                {partial_sums, inv_std, dgamma, dbeta}, layout);
        });
}

// Rows of a tile of inputs whose gradients are found from those of the outputs, see gather_strips.
//   Depends   whether the statistics depend on x
template <bool Whole, bool Depends, typename T, typename Tile>
struct InputGradientRows {
    using A = accumulate_t<T>;
    static constexpr bool kOfPlanes = Tile::kWidth == 1;
    static constexpr int kStride = Tile::kStride, kChannels = Tile::kWidth;
    // Of a row: vectors of channels, or one of neighbours.
    static constexpr int kVectors = kOfPlanes ? 1 : Tile::kBody;
    static constexpr int kWidth = kOfPlanes ? Tile::kBody : Tile::kWidth;
    const T* x;  // of the plane, as dx
    T* dx;
    int begin;  // block of rows that the tile ends with
    int column, row_values, height, width, step;
    bool asks;  // for what it reads, of the threads of a sector
    ClippingActivation<A> phi;
    Normalization<A> norms[kChannels];
    InputGradient<A> input_gradients[kChannels];
    Vector<T, kWidth> values[kVectors];

    __device__ __forceinline__ explicit InputGradientRows(int activation) : phi(activation) {}

    __device__ __forceinline__ void load_channels(const ChannelArrays<A>& of_channels, const A* dgamma_c,
                                                  const A* dbeta_c, A inv_count, int first) {
        A mean[kChannels], inv_std[kChannels], gamma[kChannels], beta[kChannels], dgamma[kChannels],
            dbeta[kChannels];
        load_neighbours(of_channels.mean, first, A(0), mean);
        load_neighbours(of_channels.inv_std, first, A(1), inv_std);
        load_neighbours(of_channels.gamma, first, A(1), gamma);
        load_neighbours(of_channels.beta, first, A(0), beta);
        load_neighbours(dgamma_c, first, A(0), dgamma);
        load_neighbours(dbeta_c, first, A(0), dbeta);
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
            norms[k].set(mean[k], inv_std[k], {gamma[k], beta[k]});
            input_gradients[k].set(inv_std[k], dgamma[k], dbeta[k], inv_count);
        }
    }

    __device__ __forceinline__ void expect(int block) {
        load(block * kStride);
        ask(block - 2);
    }
    // Asks for the rows of a block, if they are of this tile.
    __device__ __forceinline__ void ask(int block) const {
        if (!asks || block < begin) return;
#pragma unroll
        for (int r = 0; r < kStride; ++r) {
#pragma unroll
            for (int c = 0; c < kVectors; ++c) {
                if (exists(block * kStride + r, c)) prefetch(x + place(block * kStride + r, c));
            }
        }
    }

    template <typename Sums>
    __device__ __forceinline__ void write(int row, int r, const Sums& sums) {
#pragma unroll
        for (int c = 0; c < kVectors; ++c) {
            T* const target = dx + place(row, c);
            if constexpr (kOfPlanes) {
                store_pieces<Whole, kWidth>(found(sums.row(r), values[c]), target, width - column, width);
            } else if (exists(row, c)) {
                found(sums.column(r, c), values[c]).store(target);
            }
        }
        // More than a row at a time would take too many registers.
        if (r + 1 < kStride) load(row + 1);
    }

  private:
    // Of vector c in a row, if it exists.
    __device__ __forceinline__ int place(int row, int c) const {
        return row * row_values + (kOfPlanes ? column : (column + c) * step);
    }
    __device__ __forceinline__ bool exists(int row, int c) const {
        return row < height && (kOfPlanes || column + c < width);
    }

    __device__ __forceinline__ void load(int row) {
#pragma unroll
        for (int c = 0; c < kVectors; ++c) {
            if (!exists(row, c)) continue;
            const T* const source = x + place(row, c);
            if constexpr (kOfPlanes) {
                load_pieces<Whole, kWidth>(values[c], source, width - column, width);
            } else {
                values[c] = Vector<T, kWidth>::load(source);
            }
        }
    }

    __device__ __forceinline__ Vector<T, kWidth> found(const Vector<T, kWidth>& gradients,
                                                       const Vector<T, kWidth>& inputs) const {
        A results[kWidth];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
            const int channel = channel_of<kChannels>(k);
            const Normalization<A>& norm = norms[channel];
            // Of z the activation asks for the sign alone, so that one difference will do.
            const A below = norm.mean - widened(inputs, k);
            const A dz = phi.backward(widened(gradients, k), fma(below, -norm.scale, norm.shift));
            results[k] =
                Depends ? input_gradients[channel].apply_below(dz, below, norm) : fma(dz, norm.scale, A(0));
        }
        return rounded<T>(results);
    }
};

// Launch: as gather_strips. Arrays of channels are aligned to 16 bytes.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads, ChannelsLast ? 2 : 3)
    batch_norm_max_pool_input_gradient(const T* dy, const unsigned char* argmax, const T* x,
                                       const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                                       const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                       int activation, const accumulate_t<T>* dgamma,
                                       const accumulate_t<T>* dbeta, T* dx, accumulate_t<T> inv_count,
                                       int strip, PoolWindow window) {
    using A = accumulate_t<T>;
    using Tile = PoolTile<T, Kernel, Stride, Pad, ChannelsLast>;
    // Channels can be counted in 32 bits.
    const int channels = static_cast<int>(window.channels);
    const auto run = [&](auto whole, auto depends) {
        using Rows = InputGradientRows<decltype(whole)::value, decltype(depends)::value, T, Tile>;
        gather_strips<decltype(whole)::value, T, Tile, Deep && Tile::kOverlap>(
            dy, argmax, strip, window,
            [&](const PoolPosition<int>& tile, const auto& input, int begin, int end) {
                const long long before = input.before(tile) + input.row(tile.at[0], 0);
                Rows rows(activation);
                rows.x = x + before;
                rows.dx = dx + before;
                rows.begin = begin;
                rows.column = tile.at[2] * Tile::kBody;
                rows.row_values = input.row(0, 1);
                rows.height = input.height;
                rows.width = input.width;
                rows.step = input.groups * Tile::kWidth;
                rows.asks =
                    asks_for_sector((ChannelsLast ? tile.group : tile.at[2]) * kVectorBytes, kVectorBytes);
                rows.ask(end - 2);  // which expect() would not
                rows.load_channels({mean, inv_std, gamma, beta}, dgamma, dbeta, inv_count,
                                   static_cast<int>(tile.image) % channels + tile.group * Tile::kWidth);
                return rows;
            },
            number_from_the_end());
    };
    by_whole_tiles<Tile>(window, [&](auto whole) {
        if (dgamma != nullptr) {
            run(whole, Constant<true>());
        } else {
            run(whole, Constant<false>());
        }
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
                                            int slots_of_x, int strip, PoolWindow window, Layout layout) {
    DYNAMIC_SHARED(slots);
    backward_persistent<T, kClipping, PooledGradient<T, Layout, Window...>>(
        {dy, argmax, window, strip}, x, {mean, inv_std, gamma, beta}, nullptr, activation,
        {partial_sums, inv_std, dgamma, dbeta}, dx, nullptr, barrier_count, inv_count, slots_of_x, slots,
        layout);
}
