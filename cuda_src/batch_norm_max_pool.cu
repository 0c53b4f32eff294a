// Max pooling of normalised and activated values, which are never written: each is computed when it is read.
//
// The values that are compared are rounded to T, as batch norm would write them: outputs and taps are those
// of the two in a row, to the last bit.
#include "max_pool_tile.cuh"
#include "normalization.cuh"

// The normalization of Width neighbouring channels.
template <typename A, int Width>
struct ChannelNorms {
    Normalization<A> norms[Width];

    __device__ __forceinline__ ChannelNorms(const A* mean_c, const A* inv_std_c, const A* gamma_c,
                                            const A* beta_c, int channel) {
        A mean[Width], inv_std[Width], gamma[Width], beta[Width];
        load_neighbours(mean_c, channel, A(0), mean);
        load_neighbours(inv_std_c, channel, A(1), inv_std);
        load_neighbours(gamma_c, channel, A(1), gamma);
        load_neighbours(beta_c, channel, A(0), beta);
#pragma unroll
        for (int k = 0; k < Width; ++k) norms[k].set(mean[k], inv_std[k], {gamma[k], beta[k]});
    }
};

// y = largest phi(gamma * (x - mean) * inv_std + beta) of each window, as max_pool_forward of max_pool.cu.
//   x                            [images, input, groups] of Width T, aligned to the vector
//   mean, inv_std, gamma, beta   [channels], aligned to 16 bytes; gamma, beta may be null: 1, 0
//   activation                   none, ReLU or leaky ReLU: its number, see PiecewiseLinearActivation
//   y, argmax                      [images, output, groups] of Width T, window.argmax_bytes
// Launch: 1-D, kPoolThreads, any number of blocks (grid-stride); units are outputs.
template <typename T, int Width>
__global__ void __launch_bounds__(kPoolThreads, kFusedBlocks<kPiecewiseLinear>)
    batch_norm_max_pool_forward(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                                const accumulate_t<T>* gamma, const accumulate_t<T>* beta, int activation,
                                T* y, unsigned char* argmax, PoolWindow window) {
    using A = accumulate_t<T>;
    const long long image_size = input_image(window);
    const PiecewiseLinearActivation<A> phi(activation);
    // Images and channels can be counted in 32 bits: their arrays are larger than any memory otherwise.
    const int channels = static_cast<int>(window.channels);
    for_each_unit<int>(window, [&](const PoolPosition<int>& output, long long unit) {
        const T* image = x + output.image * image_size * Width;
        const int plane = static_cast<int>(output.image) % channels;
        const ChannelNorms<A, Width> of(mean, inv_std, gamma, beta, plane + output.group * Width);
        const PoolExtent<int> extent(window, nullptr, output.image);
        Vector<T, Width> best;
        int chosen[Width];
        bool found = false;
        A nothing;
        set_negative_infinity(nothing);
#pragma unroll
        for (int k = 0; k < Width; ++k) {
            best[k] = from_accumulate<T>(nothing);
            chosen[k] = 0;
        }
        for_each_tap(window, output, extent, [&](int tap, int i) {
            const Vector<T, Width> values = Vector<T, Width>::load(image + static_cast<long long>(i) * Width);
#pragma unroll
            for (int k = 0; k < Width; ++k) {
                const T rounded =
                    from_accumulate<T>(phi.forward(of.norms[k].apply(to_accumulate(values[k]))));
                const A value = to_accumulate(rounded);
                if (!found || value > to_accumulate(best[k]) || value != value) {
                    best[k] = rounded;
                    chosen[k] = tap;
                }
            }
            found = true;
        });
        best.store(y + unit * Width);
        store_argmax<Width>(argmax, unit, chosen, window.argmax_bytes);
    });
}

// Values are normalised and activated when they are read: what forward_strips takes.
template <typename A, typename Activation>
struct Normalized {
    const A *mean, *inv_std, *gamma, *beta;
    int channels;
    Activation phi;

    template <typename T, int Width>
    struct OfTile {
        static constexpr bool kChanges = true;
        ChannelNorms<A, Width> of;
        Activation phi;

        __device__ __forceinline__ OfTile(const Normalized& all, const PoolPosition<int>& tile)
            : of(all.mean, all.inv_std, all.gamma, all.beta,
                 static_cast<int>(tile.image) % all.channels + tile.group * Width),
              phi(all.phi) {}

        __device__ __forceinline__ A at(A value, int k) const {
            return phi.forward(of.norms[k].apply(value));
        }

        __device__ __forceinline__ Vector<T, Width> vector(const Vector<T, Width>& values) const {
            A results[Width];
#pragma unroll
            for (int k = 0; k < Width; ++k) results[k] = at(widened(values, k), k);
            return rounded<T>(results);
        }
        __device__ __forceinline__ T value(T value) const {
            return from_accumulate<T>(at(to_accumulate(value), 0));
        }
        __device__ __forceinline__ unsigned int pair(unsigned int word) const {
            Vector<T, 2> values;
            values.words[0] = word;
            const A results[2] = {at(widened(values, 0), 0), at(widened(values, 1), 0)};
            return rounded<T>(results).words[0];
        }
    };
};

// Those of PiecewiseLinearActivation that are not ReLU, with no number in a register.
struct NoActivation {
    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return x;
    }
};
struct FixedSlope {
    template <typename A>
    static __device__ __forceinline__ A forward(A x) {
        return x <= A(0) ? x * A(0.01) : x;
    }
};

// The same for windows known when compiled, by tiles: each value is normalised once for a row of a tile.
//   x, mean, inv_std, gamma, beta, activation, y, argmax   as there; one byte a tap
//   strip                                                  as max_pool_forward_tiled
// Launch: as max_pool_forward_tiled.
template <typename T, int Kernel, int Stride, int Pad, bool ChannelsLast, bool Deep>
__global__ void __launch_bounds__(kPoolThreads, ChannelsLast ? 2 : 4)
    batch_norm_max_pool_forward_tiled(const T* x, const accumulate_t<T>* mean, const accumulate_t<T>* inv_std,
                                      const accumulate_t<T>* gamma, const accumulate_t<T>* beta,
                                      int activation, T* y, unsigned char* argmax, int strip,
                                      PoolWindow window) {
    using A = accumulate_t<T>;
    const int channels = static_cast<int>(window.channels);
    by_whole_tiles<PoolTile<T, Kernel, Stride, Pad, ChannelsLast>>(window, [&](auto whole) {
        const auto run = [&](auto phi) {
            forward_strips<decltype(whole)::value, T, Kernel, Stride, Pad, ChannelsLast, Deep>(
                x, y, argmax, strip, window,
                Normalized<A, decltype(phi)>{mean, inv_std, gamma, beta, channels, phi});
        };
        if (activation == 0) {
            run(Relu());
        } else if (activation == kNoActivation) {
            run(NoActivation());
        } else {
            run(FixedSlope());
        }
    });
}
