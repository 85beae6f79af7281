// What the backward does, as vitkernels/backends/cuda/backward_plan.py plans it, and the tiles that there are kernels of.
//
// Letters: problem.h; M = B·rows patches.
#pragma once

#include "common/patch_layout.h"

namespace vk::backward {

enum class Product : int { f16, bf16, tf32, f32, f64 };

inline int sum_bytes(const Problem& p) { return p.compute == Dtype::f64 ? 8 : 4; }

// A block's part of a product: BM×BN sums, BK of the summed index at a step, warps_m × warps_n warps.
struct Shape {
    int BM, BN, BK, warps_m, warps_n, resident;  // resident: blocks of one multiprocessor, which bounds the registers
};
constexpr int threads_of(Shape s) { return 32 * s.warps_m * s.warps_n; }

inline constexpr int STAGES = 3;       // steps under way
inline constexpr int ROW_STEPS = 4;    // steps whose patches are looked up at once

// Of weight_kernel: the large one, 0, and one for a weight of few tiles, 1
constexpr Shape weight_shape(Product product, int size) {
    if (product == Product::f64) return size == 0 ? Shape{64, 64, 16, 2, 2, 2} : Shape{32, 32, 16, 1, 2, 4};
    int BK = product == Product::f16 || product == Product::bf16 ? 32 : 16;
    return size == 0 ? Shape{128, 128, BK, 2, 4, 2} : Shape{64, 64, BK, 2, 2, 4};
}
constexpr Shape images_shape(Product product) {
    if (product == Product::f64) return {64, 64, 16, 2, 2, 2};
    return {128, 64, product == Product::f16 || product == Product::bf16 ? 32 : 16, 2, 2, 3};
}

constexpr int value_bytes(Product product) {
    return product == Product::f64 ? 8 : product == Product::f16 || product == Product::bf16 ? 2 : 4;
}
// Elements between rows of an operand in shared memory. With the summed index outermost, eight more than the columns:
// an odd number of 16-byte pieces for 16 bits, and for TF32 four rows of eight words in 32 banks.
constexpr int pitch_across(int columns) { return columns + 8; }
constexpr int pitch_along(Product product, int BK) { return BK + 16 / value_bytes(product); }

// How an operand comes to shared memory, eight elements to a thread at a time.
enum class LoaderKind : int {
    straight,  // copied there asynchronously: it is of the product's type already
    raw,       // copied asynchronously as it is; the thread that copied it converts it later
    each,      // loaded one by one: strides, or patches whose rows do not begin at multiples of 4 bytes
};

struct Operand {
    const void* data;
    Dtype dtype;
    int shift;  // of an index, to bytes
    LoaderKind loader;
    int chunk;  // bytes copied at a time
};

inline int shift_of(Dtype dtype) {
    int size = size_of(dtype);
    return size == 8 ? 3 : size == 4 ? 2 : size == 2 ? 1 : 0;
}

struct Tile {
    int BM, BN, BK;

    bool is(Shape s) const { return BM == s.BM && BN == s.BN && BK == s.BK; }
};

struct LoadedBy {  // of an operand, what is planned
    LoaderKind loader;
    int chunk;

    Operand operator()(const Tensor& t) const { return {t.data, t.dtype, shift_of(t.dtype), loader, chunk}; }
};

// Plans: backward_plan.py and images_plan.py say what their fields are.

struct WeightPlan {
    bool wgmma;
    Tile tile;
    int64_t splits, chunk, tiles_k, tiles, blocks;
    LoadedBy pixels, grad;
    int shared_bytes, block[3], group, stages, pair;
};

struct SumsPlan {
    int64_t first, last, stored, table_rows, splits, chunk, blocks, tiles_d;
    int lanes;
};

struct PixelClass {
    int first[3], size[3], windows[3];  // (t, y, x)
    Divisor by_size[3], by_windows[3];
    int columns, pitch, all_windows;
    int64_t packed, tiles, first_block;
};

struct ImagesPlan {
    PixelClass classes[8];
    int count, cells[3], shared_bytes;
    int64_t M, blocks, packed;
    LoadedBy grad;
};

struct WgmmaImagesPlan {
    int BN, block[3], group, stages, shared_bytes, pair;
    int64_t tiles_k, tiles, blocks, weight_row;
};

struct BackwardPlan {
    bool indexed, has_weight, has_sums, has_images, has_wgmma_images;
    int64_t piece, copy_row;
    WeightPlan weight;
    SumsPlan sums;
    ImagesPlan images;
    WgmmaImagesPlan wgmma_images;
    int64_t weight_parts, table_parts, bias_parts, copies, packed, heads, nexts;  // where they begin in scratch
};

// weight_sm90.cuh: sums of 128 elements of a patch, as rows of pixels, by BM channels; a step's patches
inline constexpr int WGMMA_ROWS = 8, WGMMA_PIXELS = 16, WGMMA_STEP = 64;
inline constexpr int SUMS_THREADS = 256;

}  // namespace vk::backward
