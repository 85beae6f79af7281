// One warp's part of a product: WM×WN sums in registers, and the operands as it reads them from shared memory.
//
// An operand is anything with, on tensor cores,
//   a.fragment(r, row, k)      16 rows × K_STEP from (row, k), as multiply_add takes them
//   b.fragments(r, column, k)  K_STEP × 16 columns: b0, b1 of the first 8 columns, then of the others
// and without them a(row, k) and b(column, k), one value. Rows and columns are the block's.
#pragma once

#include "common/dtypes.cuh"

namespace vk {

VK_DEVICE int lane_index() { return thread_index() % 32; }
VK_DEVICE int warp_index() { return shuffle(thread_index() / 32, 0); }  // known to be the same in all of a warp

// Slices of sums, of STAGED_ROWS rows, go through shared memory so that a row is written by neighbouring threads.
inline constexpr int STAGED_ROWS = 16;

struct alignas(8) Two {
    float value[2];
};

template <class T, int WM, int WN, bool TENSOR_CORES = (Kind<T>::K_STEP > 0)>
struct WarpTile;

template <class T, int WM, int WN>
struct WarpTile<T, WM, WN, true> {
    using Sum = float;
    static constexpr int K_STEP = Kind<T>::K_STEP;
    float c[WM / 16][WN / 8][4];

    VK_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
#pragma unroll
            for (int j = 0; j < WN / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) c[i][j][e] = 0;
    }

    // c += a·b for the warp's rows and columns of the block, and k … k + K_STEP − 1
    template <class A, class B>
    VK_DEVICE void step(const A& a, int row, const B& b, int column, int k) {
        using Value = typename Kind<T>::Value;
        uint32_t left[WM / 16][4], right[WN / 16][4];
#pragma unroll
        for (int i = 0; i < WM / 16; ++i) a.fragment(left[i], row + 16 * i, k);
#pragma unroll
        for (int j = 0; j < WN / 16; ++j) b.fragments(right[j], column + 16 * j, k);
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
#pragma unroll
            for (int j = 0; j < WN / 16; ++j) {
                multiply_add<Value>(c[i][2 * j], left[i], right[j][0], right[j][1]);
                multiply_add<Value>(c[i][2 * j + 1], left[i], right[j][2], right[j][3]);
            }
    }

    // Rows 16·part … of the warp's tile, to the epilogue's staging
    VK_DEVICE void put(int part, float* staged, int pitch) const {
        int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
            if (i == part)
#pragma unroll
                for (int j = 0; j < WN / 8; ++j)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        *reinterpret_cast<Two*>(staged + (g + 8 * h) * pitch + 8 * j + 2 * t) = {c[i][j][2 * h],
                                                                                                c[i][j][2 * h + 1]};
    }
};

template <class T, int WM, int WN>
struct WarpTile<T, WM, WN, false> {  // a thread has rows l/8 + 4i and columns l%8 + 8j of its warp's tile
    using Sum = typename Kind<T>::Sum;
    static constexpr int K_STEP = 1;
    Sum c[WM / 4][WN / 8];

    VK_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < WM / 4; ++i)
#pragma unroll
            for (int j = 0; j < WN / 8; ++j) c[i][j] = 0;
    }

    template <class A, class B>
    VK_DEVICE void step(const A& a, int row, const B& b, int column, int k) {
        Sum left[WM / 4], right[WN / 8];
#pragma unroll
        for (int i = 0; i < WM / 4; ++i) left[i] = a(row + lane_index() / 8 + 4 * i, k);
#pragma unroll
        for (int j = 0; j < WN / 8; ++j) right[j] = b(column + lane_index() % 8 + 8 * j, k);
#pragma unroll
        for (int i = 0; i < WM / 4; ++i)
#pragma unroll
            for (int j = 0; j < WN / 8; ++j) c[i][j] += left[i] * right[j];
    }

    VK_DEVICE void put(int part, Sum* staged, int pitch) const {
#pragma unroll
        for (int i = 0; i < WM / 4; ++i)
            if (i / 4 == part)
#pragma unroll
                for (int j = 0; j < WN / 8; ++j)
                    staged[(lane_index() / 8 + 4 * (i % 4)) * pitch + lane_index() % 8 + 8 * j] = c[i][j];
    }
};

// 16-bit operands with k innermost: (row, k) at row·pitch + k. A pitch of an odd number of 16-byte pieces has no bank
// conflicts.
template <class T>
struct AlongK {
    const T* values;
    int pitch;

    VK_DEVICE void fragment(uint32_t (&r)[4], int row, int k) const {
        int lane = lane_index();
        load_matrices(r, values + (row + lane % 16) * pitch + k + lane / 16 * 8);
    }
    VK_DEVICE void fragments(uint32_t (&r)[4], int column, int k) const {
        int lane = lane_index();
        load_matrices(r, values + (column + lane / 16 * 8 + lane % 8) * pitch + k + lane / 8 % 2 * 8);
    }
};

// The same with rows (columns) innermost: (row, k) at k·pitch + row
template <class T>
struct AcrossK {
    const T* values;
    int pitch;

    VK_DEVICE void fragment(uint32_t (&r)[4], int row, int k) const {
        int lane = lane_index();
        load_matrices_transposed(r, values + (k + lane / 16 * 8 + lane % 8) * pitch + row + lane / 8 % 2 * 8);
    }
    VK_DEVICE void fragments(uint32_t (&r)[4], int column, int k) const {
        int lane = lane_index();
        load_matrices_transposed(r, values + (k + lane / 8 % 2 * 8 + lane % 8) * pitch + column + lane / 16 * 8);
    }
};

// Operands read one by one, (row, k) at row·row_step + k·k_step: f32, f64, and f32 rounded to TF32.
template <class T>
struct Elements {
    const T* values;
    int row_step, k_step;

    VK_DEVICE T operator()(int row, int k) const { return values[row * row_step + k * k_step]; }
    VK_DEVICE void fragment(uint32_t (&r)[4], int row, int k) const {
        int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int e = 0; e < 4; ++e) r[e] = to_tf32((*this)(row + g + e % 2 * 8, k + t + e / 2 * 4));
    }
    VK_DEVICE void fragments(uint32_t (&r)[4], int column, int k) const {
        int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int e = 0; e < 4; ++e) r[e] = to_tf32((*this)(column + g + e / 2 * 8, k + t + e % 2 * 4));
    }
};

}  // namespace vk
