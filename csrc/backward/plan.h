// What the backward will do, as plain arithmetic: tiles, splits, how operands are read, and where scratch lies.
//
// Letters: problem.h; M = B·rows patches.
#pragma once

#include <algorithm>
#include <string>

#include "forward/plan.h"
#include "common/patch_layout.h"

namespace vk::backward {

enum class Product : int { f16, bf16, tf32, f32, f64 };

inline Product product_of(const Problem& p) {
    switch (p.compute) {
        case Dtype::f16: return Product::f16;
        case Dtype::bf16: return Product::bf16;
        case Dtype::f32: return p.tf32 ? Product::tf32 : Product::f32;
        default: return Product::f64;
    }
}
inline int sum_bytes(const Problem& p) { return p.compute == Dtype::f64 ? 8 : 4; }

// A block's part of a product: BM×BN sums, BK of the summed index at a step, warps_m × warps_n warps.
struct Shape {
    int BM, BN, BK, warps_m, warps_n, resident;  // resident: blocks of one multiprocessor, which bounds the registers
};
constexpr int threads_of(Shape s) { return 32 * s.warps_m * s.warps_n; }

inline constexpr int STAGES = 3;       // steps under way
inline constexpr int ROW_STEPS = 4;    // steps whose patches are looked up at once
inline constexpr int SIZES = 2;        // shapes of weight_kernel: the large one, and one for a weight of few tiles
inline constexpr double RATE[SIZES] = {1, 0.6};  // of multiply-adds, as in vitkernels/tuning.py

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
enum class Road : int {
    straight,  // copied there asynchronously: it is of the product's type already
    raw,       // copied asynchronously as it is; the thread that copied it converts it later
    each,      // loaded one by one: strides, or patches whose rows do not begin at multiples of 4 bytes
};

struct Source {
    const void* data;
    Dtype dtype;
    int shift;  // of an index, to bytes
    Road road;
    int chunk;  // bytes copied at a time
};

inline int shift_of(Dtype dtype) {
    int size = size_of(dtype);
    return size == 8 ? 3 : size == 4 ? 2 : size == 2 ? 1 : 0;
}

// The largest piece, in bytes, of which eight elements, all these numbers of elements and the address are multiples; 0:
// none that can be copied asynchronously.
template <class Steps>
int chunk_of(const void* data, Dtype dtype, const Steps& steps) {
    int64_t size = size_of(dtype);
    for (int chunk = 16; chunk >= 4; chunk /= 2) {
        bool fits = chunk >= size && 8 * size % chunk == 0 && reinterpret_cast<uintptr_t>(data) % chunk == 0;
        for (int64_t step : steps) fits = fits && step * size % chunk == 0;
        if (fits) return chunk;
    }
    return 0;
}

inline Source source_of(const Tensor& t, int chunk, bool as_it_is) {
    Road road = chunk == 0 ? Road::each : as_it_is ? Road::straight : Road::raw;
    return {t.data, t.dtype, shift_of(t.dtype), road, chunk};
}

inline Source pixels_of(const Problem& p, const Walk& w, const Tensor& images) {
    int64_t side = w.pad_w > 0 ? w.W : 0;  // a piece must not cross the image's edge
    int64_t steps[] = {w.P_w, p.G[2] > 1 ? w.S_w : 0, w.pad_w, side, p.B > 1 ? w.b : 0, w.channels_last ? 0 : w.c,
                       w.f, w.h};
    int chunk = w.w == 1 ? chunk_of(images.data, images.dtype, steps) : 0;
    return source_of(images, chunk, images.dtype == p.compute && !scaling_of(p).normalised);
}

inline Source grad_of(const Problem& p, const Tensor& grad) {
    int64_t steps[] = {grad.strides[0], grad.strides[1]};
    int chunk = grad.strides[2] == 1 ? chunk_of(grad.data, grad.dtype, steps) : 0;
    return source_of(grad, chunk, grad.dtype == p.compute);
}

// A stride past the image is as good as one that ends with it.
inline Problem within_image(Problem p) {
    int64_t size[] = {p.F, p.H, p.W};
    for (int i = 0; i < 3; ++i) p.S[i] = std::min(p.S[i], std::max(p.P[i], size[i] + p.pad[i]));
    return p;
}

// dW

struct WeightPlan {
    bool hopper;         // hopper_weight.cuh
    int size;            // of SIZES, or of HOPPER_CHANNELS
    int64_t splits;      // of the M patches
    int64_t chunk;       // patches of one; with hopper those of its blocks, beyond the grid's edge too
    int64_t tiles_k, tiles;
    Source pixels, grad;
    int shared_bytes;
    int block[3], stages;  // hopper: images × grid lines × grid columns of a step
    int64_t blocks;        // of the launch
};

// hopper_weight.cuh: sums of 128 elements of a patch, as rows of pixels, by 256 or 128 channels; a step's patches
inline constexpr int HOPPER_ROWS = 8, HOPPER_PIXELS = 16, HOPPER_STEP = 64;
inline constexpr int HOPPER_CHANNELS[] = {256, 128};
inline constexpr double HOPPER_RATE[] = {1.6, 1.3};  // guesses, in RATE's unit

// Several parts of dW have at most so many bytes together.
inline constexpr int64_t WEIGHT_BYTES = 20 << 20;
inline constexpr int64_t TABLE_BYTES = 8 << 20;

// What the columns (elements of a patch) and the rows (patches) of a tile are, in shared memory before the operands:
// Column, two values to normalise by, and twice ROW_STEPS steps of Row.
constexpr int weight_table_bytes(Product product, Shape s) {
    int sum = product == Product::f64 ? 8 : 4;
    return s.BN * (24 + 2 * sum) + 2 * ROW_STEPS * s.BK * 32;
}
constexpr int weight_operand_bytes(Product product, Shape s) {
    return STAGES * s.BK * (pitch_across(s.BM) + pitch_across(s.BN)) * value_bytes(product);
}
inline int raw_bytes(const Source& s, int columns, int BK) {
    return s.road == Road::raw ? STAGES * BK * columns * size_of(s.dtype) : 0;
}

// In multiply-adds of one multiprocessor, `multiply_adds` for each of a tile's patches, of which some more are the time
// to begin; each part is written and read once more, which takes as long as some 5 multiply-adds an element (H100: 8
// bytes at 4 TB/s).
inline double weight_cost(const Problem& p, const Gpu& gpu, const WeightPlan& plan, double multiply_adds, int begin) {
    double waves = static_cast<double>(ceil_div(plan.tiles * plan.splits, gpu.multiprocessors));
    return waves * static_cast<double>(plan.chunk + begin) * multiply_adds +
           5.0 * static_cast<double>(p.D) * static_cast<double>(p.K) * static_cast<double>(plan.splits);
}

// Why the copy engine can't bring dY and the image's patches for wgmma; none: it can.
inline std::string no_hopper_weight(const Problem& p, const Gpu& gpu, const Tensor& images, const Tensor& grad) {
    if (gpu.arch != 90) return "the GPU is no sm_90";
    if (std::string why = no_patches(p, make_walk(within_image(p), p.strides), images.data); !why.empty()) return why;
    if (p.P[1] < HOPPER_ROWS) return "patches of " + std::to_string(p.P[1]) + " rows, of 8 at least they must be";
    if (grad.dtype != p.compute) return "dY is of another type than the product";
    if (p.D > 1 && grad.strides[2] != 1) return "dY's channels are " + std::to_string(grad.strides[2]) + " apart";
    if ((reinterpret_cast<uintptr_t>(grad.data) + p.T * grad.strides[1] * 2) % 16) return "dY is not on 16 bytes";
    if (p.B > 1 && (grad.strides[0] <= 0 || grad.strides[0] % 8)) return "dY's images are not 16 bytes apart";
    if (grad.strides[1] <= 0 || grad.strides[1] % 8) return "dY's rows are not 16 bytes apart";
    return "";
}

// Tiles of 128 elements: 8 rows × 16 pixels of a channel
inline int64_t hopper_tiles_k(const Problem& p, bool channels_last) {
    int64_t wide = channels_last ? p.C : 1, channels = channels_last ? 1 : p.C;
    return channels * (p.P[2] * wide / HOPPER_PIXELS) * ceil_div(p.P[1], HOPPER_ROWS);
}

inline WeightPlan weight_plan(const Problem& p, const Gpu& gpu, const Tensor& images, const Tensor& grad) {
    Product product = product_of(p);
    WeightPlan best{};
    double least = 0;
    // All splits of `steps` steps of so many patches
    auto consider = [&](WeightPlan plan, int64_t steps, int step, double multiply_adds, int begin) {
        int64_t most = std::min({steps, WEIGHT_BYTES / (p.D * p.K * sum_bytes(p)),
                                 4 * gpu.multiprocessors / plan.tiles});
        for (int64_t splits = 1; splits <= std::max<int64_t>(1, most); ++splits) {
            int64_t each = ceil_div(steps, splits);
            plan.chunk = each * step, plan.splits = ceil_div(steps, each);
            double cost = weight_cost(p, gpu, plan, multiply_adds, begin);
            if (best.splits == 0 || cost < least) least = cost, best = plan;
        }
    };
    for (int size = 0; size < SIZES; ++size) {
        Shape s = weight_shape(product, size);
        WeightPlan plan{};
        plan.size = size, plan.tiles_k = ceil_div(p.K, s.BN), plan.tiles = ceil_div(p.D, s.BM) * plan.tiles_k;
        consider(plan, ceil_div(p.B * p.rows, s.BK), s.BK, s.BM * s.BN / RATE[size], 4 * s.BK);
    }
    if (no_hopper_weight(p, gpu, images, grad).empty())
        for (int size = 0; size < 2; ++size) {
            WeightPlan plan{};
            int channels = HOPPER_CHANNELS[size], elements = HOPPER_ROWS * HOPPER_PIXELS;
            int stage = HOPPER_STEP * (elements * size_of(p.image) + channels * 2);
            plan.hopper = true, plan.size = size;
            plan.tiles_k = hopper_tiles_k(p, is_channels_last(p, p.strides));
            plan.tiles = plan.tiles_k * ceil_div(p.D, channels);
            choose_block(p, HOPPER_STEP, plan.block);
            plan.stages = std::min(6, (gpu.shared_bytes - 1024) / stage);  // beside them: barriers
            plan.shared_bytes = plan.stages * (stage + 16);
            if (plan.stages < 2) continue;
            int64_t steps = ceil_div(p.B, plan.block[0]) * ceil_div(p.G[1], plan.block[1]) *
                            ceil_div(p.G[2], plan.block[2]);
            consider(plan, steps, HOPPER_STEP, channels * elements / HOPPER_RATE[size], 2 * HOPPER_STEP);
        }
    best.blocks = std::min<int64_t>(best.splits * best.tiles, best.hopper ? gpu.multiprocessors : LIMIT);
    if (best.hopper) return best;
    Shape s = weight_shape(product, best.size);
    best.pixels = pixels_of(p, make_walk(within_image(p), p.strides), images);
    best.grad = grad_of(p, grad);
    int fixed = weight_table_bytes(product, s) + weight_operand_bytes(product, s);
    auto bytes = [&] { return fixed + raw_bytes(best.pixels, s.BN, s.BK) + raw_bytes(best.grad, s.BM, s.BK); };
    if (bytes() > gpu.shared_bytes && best.grad.road == Road::raw) best.grad.road = Road::each;
    if (bytes() > gpu.shared_bytes && best.pixels.road == Road::raw) best.pixels.road = Road::each;
    best.shared_bytes = bytes();
    return best;
}

// Sums of dY over images: of the token rows from `first` to `last`, to the table those before `stored`, and to the bias
// those of patches. Under a keep list a patch's row is its place in the grid, not in the list.
struct SumsPlan {
    int64_t first, last, stored;
    int64_t table_rows;  // of one part
    int64_t splits;      // of the images
    int64_t chunk;       // images of one
    int lanes;           // threads side by side along a row, eight channels each
    int64_t blocks;      // of rows
    int64_t tiles_d;     // of lanes·8 channels
};

inline constexpr int SUMS_THREADS = 256;

inline SumsPlan sums_plan(const Problem& p, const Gpu& gpu, bool bias, bool pos, bool prefix) {
    SumsPlan s{};
    s.first = prefix || (pos && p.pos_rows > p.N) ? 0 : p.T;
    s.last = bias || pos ? p.T + p.N : p.T;
    s.stored = pos ? p.T + p.N : p.T;
    s.table_rows = s.stored - s.first;
    int64_t octets = ceil_div(p.D, 8);
    for (s.lanes = 1; s.lanes < 32 && s.lanes < octets;) s.lanes *= 2;
    s.tiles_d = ceil_div(octets, s.lanes);
    s.blocks = ceil_div(s.last - s.first, SUMS_THREADS / s.lanes);
    int64_t part = std::max<int64_t>(1, s.table_rows * p.D * sum_bytes(p));
    int64_t most = std::max<int64_t>(1, std::min(ceil_div(p.B, 4), TABLE_BYTES / part));
    int64_t enough = ceil_div(4 * gpu.multiprocessors, std::max<int64_t>(1, s.blocks * s.tiles_d));
    s.chunk = ceil_div(p.B, std::min(most, enough));
    s.splits = ceil_div(p.B, s.chunk);
    return s;
}

// dX. A cell of an axis holds the pixels q·S … q·S + S − 1 of the padded image; windows q − j with 0 ≤ j < ⌈P/S⌉ saw
// its first P − (⌈P/S⌉ − 1)·S pixels, and all of those but the last saw the others. So the pixels of a cell are of one
// or two classes along each axis, and within a class every window saw every pixel: no product is with a zero that
// stands for a pixel unseen, which would carry what is not finite to it.
struct PixelClass {
    int first[3], size[3], windows[3];  // (t, y, x): first pixel in the cell, pixels, windows that saw them
    Divisor by_size[3], by_windows[3];
    int columns;         // pixels of a cell, all channels: (c, t, y, x)
    int pitch;           // of the packed weight's rows: columns, rounded up to whole copies
    int all_windows;
    int64_t packed;      // its weight begins at this element: [windows, D, pitch]
    int64_t tiles;       // of columns
    int64_t first_block;
};

struct ImagesPlan {
    PixelClass classes[8];
    int count;
    int cells[3];            // of one image
    int64_t M;               // B·cells
    int64_t tiles_m, blocks;
    int64_t packed;          // elements of the packed weight
    Source grad;
    int shared_bytes;
};

// Row and Column of images_kernel, beside its operands
constexpr int images_shared_bytes(Product product, Shape s) {
    int operands = STAGES * (s.BM * pitch_along(product, s.BK) + s.BK * pitch_across(s.BN)) * value_bytes(product);
    return s.BM * 32 + s.BN * 32 + operands;
}

inline PixelClass pixel_class(const Walk& w, int channels, int which) {
    int P[] = {w.P_t, w.P_h, w.P_w}, S[] = {w.S_t, w.S_h, w.S_w};
    PixelClass c{};
    c.columns = channels, c.all_windows = 1;
    for (int i = 0; i < 3; ++i) {
        int windows = static_cast<int>(ceil_div(P[i], S[i])), most = P[i] - (windows - 1) * S[i];
        bool others = which >> i & 1;
        c.first[i] = others ? most : 0;
        c.size[i] = others ? S[i] - most : most;
        c.windows[i] = windows - others;
        if (c.size[i] > 0) c.by_size[i] = Divisor(c.size[i]);
        if (c.windows[i] > 0) c.by_windows[i] = Divisor(c.windows[i]);
        c.columns *= c.size[i], c.all_windows *= c.windows[i];
    }
    return c;
}

inline ImagesPlan images_plan(const Problem& p, const Tensor& d_images, const Tensor& grad) {
    Walk w = make_walk(within_image(p), d_images.strides);
    Shape s = images_shape(product_of(p));
    ImagesPlan plan{};
    int size[] = {w.F, w.H, w.W}, pad[] = {w.pad_t, w.pad_h, w.pad_w}, S[] = {w.S_t, w.S_h, w.S_w};
    plan.M = p.B;
    for (int i = 0; i < 3; ++i) {
        plan.cells[i] = static_cast<int>(ceil_div(int64_t{size[i]} + pad[i], S[i]));
        plan.M *= plan.cells[i];
    }
    plan.tiles_m = ceil_div(plan.M, s.BM);
    for (int which = 0; which < 8; ++which) {
        PixelClass c = pixel_class(w, w.channels_last ? 1 : static_cast<int>(p.C), which);
        if (c.columns == 0) continue;
        c.pitch = static_cast<int>(round_up(c.columns, 8));
        c.tiles = ceil_div(c.columns, s.BN);
        c.packed = plan.packed, c.first_block = plan.blocks;
        plan.packed += int64_t{c.all_windows} * p.D * c.pitch;
        plan.blocks += plan.tiles_m * c.tiles;
        plan.classes[plan.count++] = c;
    }
    plan.grad = grad_of(p, grad);
    if (plan.grad.road == Road::raw || p.keep) plan.grad.road = Road::each;
    plan.shared_bytes = images_shared_bytes(product_of(p), s);
    return plan;
}

}  // namespace vk::backward
