// What the backward's kernels share: operands on their way to shared memory, eight elements of a row to a thread at a
// time (an octet), and a tile of sums on its way out.
#pragma once

#include <type_traits>

#include "backward/plan.h"
#include "common/warp_mma.cuh"

// The launches of the products of T: declared with `extern`, else compiled here.
#define VK_PRODUCTS(EXTERN, T)                                                                 \
    EXTERN template void launch_weight<T>(const WeightArguments&, const WeightPlan&, Stream); \
    EXTERN template void launch_images<T>(const ImagesArguments&, const ImagesPlan&, Stream);

namespace vk::backward {

template <class T>
inline constexpr Product product_as = Product::f64;
template <>
inline constexpr Product product_as<half> = Product::f16;
template <>
inline constexpr Product product_as<bfloat16> = Product::bf16;
template <>
inline constexpr Product product_as<tf32> = Product::tf32;
template <>
inline constexpr Product product_as<float> = Product::f32;

// An operand as the tensor cores read it: the summed index outermost, or innermost
template <class T>
using Across = std::conditional_t<Kind<T>::K_STEP == 16, AcrossK<typename Kind<T>::Value>,
                                  Elements<typename Kind<T>::Value>>;
template <class T>
using Along = std::conditional_t<Kind<T>::K_STEP == 16, AlongK<typename Kind<T>::Value>,
                                 Elements<typename Kind<T>::Value>>;

template <class T>
VK_DEVICE Across<T> across(const typename Kind<T>::Value* tile, int pitch) {
    if constexpr (Kind<T>::K_STEP == 16)
        return {tile, pitch};
    else
        return {tile, 1, pitch};
}
template <class T>
VK_DEVICE Along<T> along(const typename Kind<T>::Value* tile, int pitch) {
    if constexpr (Kind<T>::K_STEP == 16)
        return {tile, pitch};
    else
        return {tile, pitch, 1};
}

// N values that one or more whole instructions move
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Side {
    T values[N];
};

VK_BOTH int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
VK_DEVICE int clamp_eight(int64_t n) { return static_cast<int>(n < 0 ? 0 : n > 8 ? 8 : n); }

// Elements of an octet in memory: from its element j on, at `at` and side by side, `count` of them; 0: zeros instead.
struct Run {
    int64_t at;
    int count;
};

template <int CHUNK, class Where>
VK_DEVICE void copy_octet(char* shared, const Operand& s, const Where& where) {
    for (int j = 0; j < 8; j += CHUNK >> s.shift) {
        Run run = where(j);
        int bytes = run.count << s.shift;
        const char* from = static_cast<const char*>(s.data) + (bytes > 0 ? run.at << s.shift : 0);
        copy_async<CHUNK>(shared + (j << s.shift), from, bytes < CHUNK ? bytes : CHUNK);
    }
}
template <class Where>
VK_DEVICE void copy_octet(char* shared, const Operand& s, const Where& where) {
    if (s.chunk == 16)
        copy_octet<16>(shared, s, where);
    else if (s.chunk == 8)
        copy_octet<8>(shared, s, where);
    else
        copy_octet<4>(shared, s, where);
}

template <class From, class Sum>
VK_DEVICE void read_octet(Sum (&values)[8], const char* raw) {
    Side<From, 8> octet = *reinterpret_cast<const Side<From, 8>*>(raw);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = to<Sum>(octet.values[j]);
}
template <class Sum>
VK_DEVICE void read_octet(Sum (&values)[8], const char* raw, Dtype dtype) {
    switch (dtype) {
        case Dtype::u8: return read_octet<uint8_t>(values, raw);
        case Dtype::f16: return read_octet<half>(values, raw);
        case Dtype::bf16: return read_octet<bfloat16>(values, raw);
        case Dtype::f32: return read_octet<float>(values, raw);
        default: return read_octet<double>(values, raw);
    }
}

template <class Value, class Sum, int N>
VK_DEVICE void put(Value* tile, const Sum (&values)[N]) {
    if constexpr (sizeof(Value) == 2) {
        Side<uint32_t, N / 2> words;
#pragma unroll
        for (int j = 0; j < N / 2; ++j) words.values[j] = pack(values[2 * j], values[2 * j + 1], Value{});
        *reinterpret_cast<Side<uint32_t, N / 2>*>(tile) = words;
    } else {
        Side<Value, N> side;
#pragma unroll
        for (int j = 0; j < N; ++j) side.values[j] = to<Value>(values[j]);
        *reinterpret_cast<Side<Value, N>*>(tile) = side;
    }
}

template <class Sum, int N>
VK_DEVICE void clear(Sum (&values)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = 0;
}

template <class Sum>
VK_DEVICE void add(Sum (&total)[8], const Sum (&values)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) total[j] += values[j];
}

// dY, and where a keep list is the way from a patch's place in the grid to its rows: heads[b, n] is the first of the
// list that keeps patch n of image b, nexts[b, i] the one after i that keeps the same; −1: none. So what is summed over
// them is summed in order, an index that is none is nowhere, and no product with ones and zeros carries a NaN.
struct Gradient {
    const void* data;    // [B, T + rows, D]
    Dtype dtype;
    int64_t b, n, d;     // strides
    int64_t T, N, rows;
    const int32_t *heads, *nexts;  // [B, N], [B, rows]; null: every patch has its row

    // total += Σ over the rows of patch n of image `image`, channels from `channel` on
    template <class Sum>
    VK_DEVICE void add_patch(Sum (&total)[8], int64_t image, int64_t patch, int64_t channel, int count) const {
        int64_t i = heads ? heads[image * N + patch] : patch;
        while (i >= 0) {
            Sum values[8];
            clear(values);
            load_eight(values, data, dtype, image * b + (T + i) * n + channel * d, d, count);
            add(total, values);
            i = heads ? nexts[image * rows + i] : -1;
        }
    }
};

// A warp's sums by way of shared memory, so that neighbouring threads write neighbours: `write(row, column, octet)` has
// eight columns of one of its rows. `staging`: STAGED_ROWS × (WN + 4) sums for every warp, which no one reads any more.
template <int WM, int WN, class Tile, class Write>
VK_DEVICE void write_tile(const Tile& tile, typename Tile::Sum* staging, const Write& write) {
    constexpr int PITCH = WN + 4;
    typename Tile::Sum* staged = staging + warp_index() * STAGED_ROWS * PITCH;
#pragma unroll
    for (int part = 0; part < WM / STAGED_ROWS; ++part) {
        sync_warp();
        tile.put(part, staged, PITCH);
        sync_warp();
#pragma unroll
        for (int i = lane_index(); i < STAGED_ROWS * WN / 8; i += 32) {
            int row = i / (WN / 8), column = i % (WN / 8) * 8;
            auto octet = *reinterpret_cast<const Side<typename Tile::Sum, 8>*>(staged + row * PITCH + column);
            write(part * STAGED_ROWS + row, column, octet.values);
        }
    }
}

}  // namespace vk::backward
