// Loads and stores of several neighbouring elements at once.
//
// A GPU reaches its memory bandwidth with 16-byte accesses: a Vector<T> of default width is one. Arrays must
// start on a multiple of 16 bytes, which the launchers see to.
//   const Vector<T> loaded = Vector<T>::load(x + i);  // i a multiple of kVectorWidth<T>
//   for (int k = 0; k < kVectorWidth<T>; ++k) twice[k] = 2 * widened(loaded, k);
//   rounded<T, kVectorWidth<T>>(twice).store(y + i);
#pragma once

#include "numeric.cuh"

constexpr int kVectorBytes = 16;
// What the memory gives at least.
constexpr int kSectorBytes = 32;

// Elements of T in one 16-byte access.
template <typename T>
constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(T));

// The unsigned word that moves Bytes bytes in one instruction.
template <int Bytes>
struct MemoryWord;
template <>
struct MemoryWord<1> {
    using type = unsigned char;
};
template <>
struct MemoryWord<2> {
    using type = unsigned short;
};
template <>
struct MemoryWord<4> {
    using type = unsigned int;
};
template <>
struct MemoryWord<8> {
    using type = uint2;
};
template <>
struct MemoryWord<16> {
    using type = uint4;
};

template <typename Word>
__device__ __forceinline__ void store_word(Word* target, const Word& word) {
    *target = word;
}

#ifndef GPU_LAYERS_EMULATED
// The compiler may take an assignment of 16 bytes apart into narrower stores; this it cannot.
template <>
__device__ __forceinline__ void store_word<uint4>(uint4* target, const uint4& word) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(word.x), "r"(word.y),
                 "r"(word.z), "r"(word.w)
                 : "memory");
}
#endif

// Asks for what is at an address to be brought into the L2 cache, and does not wait for it: a thread that
// walks along has little on its way otherwise.
__device__ __forceinline__ void prefetch(const void* address) {
#if !defined(GPU_LAYERS_EMULATED) && __CUDA_ARCH__ >= 800
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Whether a thread asks for what it reads, of threads that read so many bytes each, one after the other. To
// ask takes a cycle of a multiprocessor for each lane, so that the first one of a sector asks for all. On
// older GPUs each does: there it would take registers that kernels do not have.
__device__ __forceinline__ bool asks_for_sector(unsigned int begin, unsigned int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return true;
#else
    return begin % kSectorBytes < bytes;
#endif
}

// The same number, which the compiler keeps: what is used in branches it would compute in each of them.
__device__ __forceinline__ long long kept(long long number) {
#ifndef GPU_LAYERS_EMULATED
    asm volatile("" : "+l"(number));
#endif
    return number;
}

// A pointer to global memory, or if InShared to shared memory, likewise: compilers would add its parts up
// anew for each element.
template <bool InShared = false, typename P>
__device__ __forceinline__ P* kept_pointer(P* pointer) {
#ifndef GPU_LAYERS_EMULATED
    auto address = InShared ? __cvta_generic_to_shared(pointer) : __cvta_generic_to_global(pointer);
    asm("" : "+l"(address));
    pointer =
        static_cast<P*>(InShared ? __cvta_shared_to_generic(address) : __cvta_global_to_generic(address));
#endif
    return pointer;
}

// N elements in registers. At most 16 bytes, moved as one word; larger ones (32-bit taps of eight half
// values) as several words of 16.
template <typename T, int N = kVectorWidth<T>>
struct Vector {
    static constexpr int kBytes = N * static_cast<int>(sizeof(T));
    static constexpr int kWordBytes = kBytes < kVectorBytes ? kBytes : kVectorBytes;
    static constexpr int kWords = kBytes / kWordBytes;
    using Word = typename MemoryWord<kWordBytes>::type;

    union {
        Word words[kWords];
        T values[N];
    };

    // Words are what is copied: T's own constructors would split the access.
    __device__ __forceinline__ Vector() {}
    __device__ __forceinline__ T& operator[](int i) { return values[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }

    // source: aligned to the vector's size (16 bytes where it is larger).
    static __device__ __forceinline__ Vector load(const T* source) {
        Vector vector;
#pragma unroll
        for (int i = 0; i < kWords; ++i) vector.words[i] = reinterpret_cast<const Word*>(source)[i];
        return vector;
    }

    __device__ __forceinline__ void store(T* target) const {
#pragma unroll
        for (int i = 0; i < kWords; ++i) store_word(reinterpret_cast<Word*>(target) + i, words[i]);
    }
};

// The same value N times.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> filled(T value) {
    Vector<T, N> vector;
#pragma unroll
    for (int k = 0; k < N; ++k) vector[k] = value;
    return vector;
}

// Value number k as it is calculated with.
template <typename T, int N>
__device__ __forceinline__ accumulate_t<T> widened(const Vector<T, N>& vector, int k) {
    return to_accumulate(vector[k]);
}
// One instruction for either half of a word.
template <int N>
__device__ __forceinline__ float widened(const Vector<__nv_bfloat16, N>& vector, int k) {
    if constexpr (N % 2 == 0) {
        const unsigned int word = reinterpret_cast<const unsigned int*>(vector.words)[k / 2];
        return __uint_as_float(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
        return to_accumulate(vector[k]);
    }
}
template <int N>
__device__ __forceinline__ float widened(const Vector<__half, N>& vector, int k) {
    if constexpr (N % 2 == 0) {
        const __half2 pair = reinterpret_cast<const __half2*>(vector.words)[k / 2];
        return k % 2 == 0 ? __low2float(pair) : __high2float(pair);
    } else {
        return to_accumulate(vector[k]);
    }
}

template <typename T>
struct HalfPair;
template <>
struct HalfPair<__half> {
    using type = __half2;
    static constexpr unsigned int kInfinity = 0x7c007c00, kNegativeInfinity = 0xfc00fc00;
};
template <>
struct HalfPair<__nv_bfloat16> {
    using type = __nv_bfloat162;
    static constexpr unsigned int kInfinity = 0x7f807f80, kNegativeInfinity = 0xff80ff80;
};

// A pair of half values, of the bits of a word.
template <typename T>
__device__ __forceinline__ typename HalfPair<T>::type pair_of(unsigned int word) {
    typename HalfPair<T>::type pair;
    memcpy(&pair, &word, sizeof(pair));
    return pair;
}

// The two values that go into one word, rounded.
__device__ __forceinline__ __half2 rounded_pair(__half, float low, float high) {
    return __floats2half2_rn(low, high);
}
__device__ __forceinline__ __nv_bfloat162 rounded_pair(__nv_bfloat16, float low, float high) {
    return __floats2bfloat162_rn(low, high);
}

// A vector of what was calculated, rounded: half types by the word, which a value at a time would be put
// together of.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> rounded(const accumulate_t<T> (&values)[N]) {
    Vector<T, N> vector;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const auto pair = rounded_pair(T(), values[i], values[i + 1]);
            reinterpret_cast<unsigned int*>(vector.words)[i / 2] =
                reinterpret_cast<const unsigned int&>(pair);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) vector[i] = from_accumulate<T>(values[i]);
    }
    return vector;
}
