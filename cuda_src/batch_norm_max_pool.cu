// Max pooling of normalised and activated values, which are never written: each is computed for every window
// that looks at it.
//
// The values that are compared are rounded to T, as batch norm would write them: outputs and taps are those
// of the two in a row, to the last bit.
#include "argmax.cuh"
#include "batch_norm_rules.cuh"
#include "pool_window.cuh"

// The rules of Width neighbouring channels.
template <typename A, int Width>
struct ChannelRules {
    Normalization<A> rules[Width];

    __device__ __forceinline__ ChannelRules(const A* mean, const A* inv_std, const A* gamma, const A* beta,
                                            int channel) {
#pragma unroll
        for (int k = 0; k < Width; ++k) rules[k].load(mean, inv_std, gamma, beta, channel + k);
    }
};

// y = largest phi(gamma * (x - mean) * inv_std + beta) of each window, as max_pool_forward of max_pool.cu.
//   x                            [images, input, groups] of Width T, aligned to the vector
//   mean, inv_std, gamma, beta   [channels]; gamma, beta may be null: 1, 0
//   activation                   none, ReLU or leaky ReLU: its number, see PiecewiseLinearActivation
//   y, argmax                      [images, output, groups] of Width T, window.argmax_bytes; likewise
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
        const ChannelRules<A, Width> of(mean, inv_std, gamma, beta, plane + output.group * Width);
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
                    from_accumulate<T>(phi.forward(of.rules[k].apply(to_accumulate(values[k]))));
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
