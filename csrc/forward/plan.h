// How a problem becomes a launch: the road, the tile, and why a road can't be taken. Plain arithmetic on a problem and
// a GPU's figures, the same for the extension and for tests on a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "common/patch_layout.h"

namespace vk {

struct Scaling {
    bool normalised;  // pixels one by one: y = (x − m[c])·a[c]
    bool scaled;      // or the sum, by what all channels share
};

// The scale of all channels is a factor of the sum. One that differs by channel, or that leaves f32's range (or its
// precision, in f64), is applied to the pixels.
inline Scaling scaling_of(const Problem& p) {
    double size = std::abs(p.scale);
    bool normalised = p.normalised || (p.scale != 1 && (p.compute == Dtype::f64 || size < 1e-4 || size > 1e4));
    return {normalised, !normalised && p.scale != 1};
}

// How the patches come into shared memory:
//   gather   element by element through registers: everything the contract allows
//   copy     asynchronous copies of 4 to 16 bytes, a patch's elements side by side
//   rows     whole rows of the image, of which operands are put together when they are read: P = 14, where a patch's
//            row begins at no multiple of 16 bytes
//   patches  the copy engine cuts them out of the image (sm_90a)
enum class Road { gather, copy, rows, patches };

struct Tile {
    int BM, BN, threads;  // BM patches × BN channels
    double rate;          // guess, not measured: the share of the tensor cores' rate that it reaches
};

struct Forward {
    Road road;
    bool hopper;             // wgmma, a producer and consumers; otherwise mma.sync or plain multiply-adds
    Tile tile;
    int step_k, steps, stages, chunk;
    int stage_rows, slot_bytes, segment_bytes, segments;  // rows: of a stage; bytes of one row of all patches
    int block[3];            // patches: images × grid lines × grid columns of a tile
    int a_bytes, b_pitch, stage_bytes, table_bytes, shared_bytes;
    bool pack;               // the weight is first brought into the walk's order, the operands' type and `weight_row`
    int64_t weight_row;
    int weight_chunk;
    int64_t tiles_n, tiles, blocks;
    int64_t scratch_bytes;
};

inline constexpr int64_t LIMIT = (int64_t{1} << 31) - (int64_t{1} << 16);  // of what is counted in 32 bits
inline constexpr int64_t PACK_ROWS = 4096;  // patches from which narrow copies of the weight cost more than packing: a guess
inline constexpr int SLICE_PAD = 8;  // of a row of sums on its way through shared memory, against bank conflicts

// Tiles, large to small: tensor cores by warp; without them; wgmma
inline constexpr Tile MMA_TILES[] = {{128, 128, 256, 1.0}, {32, 64, 128, 0.45}};
inline constexpr Tile PLAIN_TILES[] = {{64, 64, 128, 1.0}};
inline constexpr Tile HOPPER_TILES[] = {{128, 256, 384, 1.0}, {128, 128, 384, 0.8}};

inline int product_step(const Problem& p) {  // elements of k in one step of the tensor cores; 0: without them
    if (p.compute == Dtype::f16 || p.compute == Dtype::bf16) return 16;
    return p.compute == Dtype::f32 && p.tf32 ? 8 : 0;
}

// Why the extension can't take a problem at all; none: it can.
inline std::vector<std::string> why_not(const Problem& p, const Gpu& gpu) {
    std::vector<std::string> reasons;
    if (gpu.arch < 80)
        reasons.push_back("the GPU is sm_" + std::to_string(gpu.arch) + "; the kernels need sm_80 or later");
    auto below = [&](const std::string& name, int64_t value) {
        if (value >= LIMIT) reasons.push_back(name + " = " + std::to_string(value) + " does not fit 32 bits");
    };
    const char* axes[] = {"F", "H", "W"};
    int64_t sizes[] = {p.F, p.H, p.W * p.C};
    for (int i = 0; i < 3; ++i) {
        int64_t wide = i == 2 ? p.C : 1;  // where channels lie side by side
        below(std::string(axes[i]) + " + 2·padding", sizes[i] + 2 * p.pad[i] * wide);
        below(std::string("the stride in ") + axes[i], p.S[i] * wide);
    }
    below("K", p.K);
    below("D", p.D);
    below("B·N", p.B * p.rows);
    below("B·T", p.B * p.T);
    return reasons;
}

inline int largest_chunk(int64_t bytes_in_common, int limit) {  // 16, 8, 4, 2 or 1
    return static_cast<int>(std::gcd(std::gcd(bytes_in_common, int64_t{16}), int64_t{limit}));
}

// The largest power of two, up to 16, that divides where every row of the image begins, in bytes.
inline int row_alignment(const Problem& p, const Walk& w, const void* images) {
    int64_t size = size_of(p.image), common = static_cast<int64_t>(reinterpret_cast<uintptr_t>(images) % 16);
    const int64_t counts[] = {p.B, w.channels_last ? 1 : p.C, p.F, p.H}, steps[] = {w.b, w.c, w.f, w.h};
    for (int i = 0; i < 4; ++i)
        if (counts[i] > 1) common = std::gcd(common, std::abs(steps[i]) * size);
    return largest_chunk(common, 16);
}

// Why pixels can't be copied 4 bytes or more at a time, a patch's elements side by side; and how many bytes they can.
inline std::string no_copy(const Problem& p, const Walk& w, const void* images, int& chunk) {
    int64_t size = size_of(p.image);
    bool same = p.image == p.compute, wider = p.image == Dtype::u8 || p.image == Dtype::f32;
    if (p.compute == Dtype::f64 || !(same || wider)) return "pixels are of another float type than the product";
    if (w.w != 1) return "pixels of a row are " + std::to_string(w.w) + " apart";
    chunk = largest_chunk(std::gcd(w.P_w * size, w.S_w * size), row_alignment(p, w, images));
    if (is_padded(w)) {
        if (scaling_of(p).normalised) return "padding, of normalised pixels";
        chunk = largest_chunk(std::gcd(w.pad_w * size, w.W * size), chunk);
    }
    if (chunk < 4) return "patches begin at multiples of " + std::to_string(chunk) + " bytes, of 4 at least they must";
    return "";
}

inline std::string no_rows(const Problem& p, const Walk& w, const void* images, int& chunk) {
    bool same = p.image == p.compute, wider = p.image == Dtype::u8 || p.image == Dtype::f32;
    if (product_step(p) == 0) return "no tensor cores in the product";
    if (!(same || wider)) return "pixels are of another float type than the product";
    if (w.w != 1) return "pixels of a row are " + std::to_string(w.w) + " apart";
    if (p.keep) return "a keep list";
    if (is_padded(w)) return "padding";
    if (w.P_w % 2 || w.S_w % 2) return "patches of an odd number of pixels in a row, or an odd stride";
    chunk = row_alignment(p, w, images);
    if (chunk < 2) return "rows begin at odd addresses";
    return "";
}

// Why the copy engine can't cut this image into patches.
inline std::string no_patches(const Problem& p, const Walk& w, const void* images) {
    int64_t size = size_of(p.image);
    bool same = p.image == p.compute, wider = p.image == Dtype::u8 || p.image == Dtype::f32;
    auto bytes = [&](const char* what, int64_t n) {
        return std::string(what) + " " + std::to_string(n) + " bytes apart, no multiple of 16";
    };
    if (product_step(p) != 16) return "the product is not of 16 bits";
    if (!(same || wider)) return "pixels are of another float type than the product";
    if (p.F != 1) return std::to_string(p.F) + " frames";
    if (p.keep) return "a keep list";
    if (is_padded(w)) return "padding";
    if (w.w != 1) return "pixels of a row are " + std::to_string(w.w) + " apart";
    if (!w.channels_last && p.C > 1 && w.c != p.H * w.h)
        return "channels are " + std::to_string(w.c) + " apart, not H·row";
    if (reinterpret_cast<uintptr_t>(images) % 16) return "images do not start on 16 bytes";
    if (p.B > 1 && (w.b <= 0 || w.b * size % 16)) return bytes("images are", w.b * size);
    if (w.h <= 0 || w.h * size % 16) return bytes("rows are", w.h * size);
    if (w.S_w * size % 16) return bytes("patches are", w.S_w * size);
    if (w.P_w % 16) return "patch rows of " + std::to_string(w.P_w) + " elements, no multiple of 16";
    return "";
}

// BM patches as images × grid lines × grid columns: the block that leaves the fewest patches empty, and among those the
// widest, as neighbours share the cache lines of their rows.
inline void choose_block(const Problem& p, int BM, int (&block)[3]) {
    int64_t best = -1;
    for (int y = 1; y <= BM; y *= 2)
        for (int x = 1; x * y <= BM; x *= 2) {
            int images = BM / (x * y);
            int64_t covered = ceil_div(p.B, images) * ceil_div(p.G[1], y) * ceil_div(p.G[2], x);
            if (best < 0 || covered < best || (covered == best && x > block[2])) {
                best = covered;
                block[0] = images, block[1] = y, block[2] = x;
            }
        }
}

// The weight is read where it lies if its rows are in the walk's order, of the operands' type, and can be copied 4 bytes
// at a time; otherwise it is packed first.
inline void plan_weight(const Problem& p, const Walk& w, const Tensor& weight, Forward& plan) {
    int64_t size = size_of(p.compute), row = p.K;
    int64_t dense[5] = {0, p.P[0] * p.P[1] * p.P[2], p.P[1] * p.P[2], p.P[2], 1};
    if (w.channels_last) dense[1] = 1, dense[2] = p.P[1] * p.P[2] * p.C, dense[3] = p.P[2] * p.C, dense[4] = p.C;
    const int64_t counts[] = {p.D, p.C, p.P[0], p.P[1], p.P[2]};
    bool there = weight.dtype == p.compute;
    for (int i = 1; i < 5; ++i) there &= counts[i] == 1 || weight.strides[i] == dense[i];
    if (p.D > 1) row = weight.strides[0];
    int64_t begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(weight.data) % 16);
    int64_t common = std::gcd(std::gcd(row * size, p.K * size), begin);
    int chunk = largest_chunk(common, 16);
    bool narrow = chunk < 4 || (chunk < 16 && (plan.hopper || p.B * p.rows >= PACK_ROWS));
    int64_t block = plan.hopper ? (plan.step_k % 64 == 0 ? 64 : 16) : 1;  // of one box of the copy engine
    plan.pack = !there || row < p.K || narrow || p.K % block || row % block;
    plan.weight_row = plan.pack ? round_up(p.K, std::max(block, 16 / size)) : row;
    plan.weight_chunk = plan.pack ? 16 : chunk;
    plan.scratch_bytes = plan.pack ? p.D * plan.weight_row * size : 0;
}

// Sizes of a road with a tile; stages that fit, 0 if fewer than two do.
inline Forward sized(const Problem& p, const Gpu& gpu, const Walk& w, const Tensor& weight, Road road,
                     bool hopper, const Tile& tile, int chunk) {
    Forward f{};
    int pixel = size_of(p.image), value = size_of(p.compute), sum = p.compute == Dtype::f64 ? 8 : 4;
    f.road = road, f.hopper = hopper, f.tile = tile, f.chunk = chunk;
    // Sums of 16 rows of each warp, on their way to tokens; on Hopper with less padding, which leaves room for 4 stages.
    int slices = hopper ? 8 * 16 * (64 + 4) * sum : tile.threads / 32 * 16 * (32 + SLICE_PAD) * sum;
    if (road == Road::rows) {
        int least = 16 / std::gcd(w.P_w, 16);  // rows that make a multiple of the tensor cores' step
        if (least * w.P_w <= 128) {
            f.stage_rows = least * std::max(1, 64 / (least * w.P_w));
            f.step_k = f.stage_rows * w.P_w;
        } else {  // a row that two steps need is copied twice
            f.step_k = 64;
            f.stage_rows = (f.step_k + w.P_w - 2) / w.P_w + 1;
        }
        int64_t line = std::min<int64_t>(w.G_w, tile.BM);
        f.segment_bytes = static_cast<int>(std::min<int64_t>(
            round_up(((line - 1) * w.S_w + w.P_w) * pixel + 2 * chunk, 16), 1 << 20));
        f.segments = static_cast<int>(ceil_div(tile.BM - 1, w.G_w) + 1);
        f.slot_bytes = std::min(f.segments * f.segment_bytes, 1 << 20);
        f.a_bytes = static_cast<int>(std::min<int64_t>(int64_t{f.stage_rows} * f.slot_bytes, 1 << 24));
        f.table_bytes = static_cast<int>(round_up(f.segments * 16, 128));
    } else if (road == Road::patches) {
        int64_t rows = std::max(1, 64 / w.P_w);
        while (p.P[1] % rows) --rows;
        f.stage_rows = static_cast<int>(rows);
        f.step_k = static_cast<int>(rows * w.P_w);
        f.a_bytes = f.step_k * tile.BM * pixel;
        choose_block(p, tile.BM, f.block);
    } else {
        f.step_k = product_step(p) == 0 ? 16 : value == 2 && tile.BM < 128 ? 64 : 32;
        f.a_bytes = tile.BM * (f.step_k * (road == Road::gather ? value : pixel) + 16);
        f.table_bytes = static_cast<int>(round_up(tile.BM * sizeof(Corner), 128));
    }
    plan_weight(p, w, weight, f);
    f.steps = static_cast<int>(ceil_div(p.K, f.step_k));
    f.b_pitch = hopper ? f.step_k : f.step_k + 16 / value;
    f.a_bytes = static_cast<int>(round_up(f.a_bytes, hopper ? 1024 : 128));
    int64_t stage = int64_t{f.a_bytes} + round_up(int64_t{tile.BN} * f.b_pitch * value, hopper ? 1024 : 128);
    // Hopper's slices have a place of their own, as the next tile is copied while they are written.
    int64_t beside = hopper ? slices + f.table_bytes + 1024 : f.table_bytes;
    int64_t room = gpu.shared_bytes - beside, half = (gpu.shared_bytes + 1024) / 2 - 1024 - beside;
    if (!hopper && half / stage >= 3) room = half;  // for two blocks on a multiprocessor; 1024 bytes of each are CUDA's
    f.stages = static_cast<int>(std::min<int64_t>(hopper ? 6 : 4, room / stage));
    f.stages = std::min(f.stages, std::max(2, f.steps + 1));
    if (f.stages < 2) f.stages = 0;
    f.stage_bytes = static_cast<int>(stage);
    f.shared_bytes = static_cast<int>(beside + std::max<int64_t>(f.stages * stage, hopper ? 0 : slices));
    if (f.shared_bytes > gpu.shared_bytes) f.stages = 0;
    f.tiles_n = ceil_div(p.D, tile.BN);
    int64_t tiles_m = ceil_div(p.B * p.rows, tile.BM);
    if (road == Road::patches)
        tiles_m = ceil_div(p.B, f.block[0]) * ceil_div(p.G[1], f.block[1]) * ceil_div(p.G[2], f.block[2]);
    f.tiles = tiles_m * f.tiles_n;
    return f;
}

// A guess, not measured: the share of the tensor cores' rate by warp that a road's pixels come fast enough for.
inline double rate_of(const Forward& f) {
    switch (f.road) {
        case Road::gather: return 0.15;
        case Road::copy: return f.chunk == 16 ? 1.0 : 0.6;
        case Road::rows: return f.hopper ? 1.4 : f.chunk == 16 ? 0.9 : 0.7;
        default: return 1.6;
    }
}

// In the time that one multiprocessor takes for a multiply-add of the largest tile; a tile begins and ends with the
// latency of some 128 of k.
inline double cost_of(const Forward& f, const Gpu& gpu) {
    double waves = static_cast<double>(ceil_div(f.tiles, gpu.multiprocessors));
    double rate = f.tile.rate * rate_of(f) * (f.stages == 2 ? 0.8 : 1.0);  // two hide less of the memory's latency
    return waves * (f.steps * f.step_k + 128) * f.tile.BM * f.tile.BN / rate;
}

// Every road with every tile that can take the problem, on images and a weight that begin at `data`, modulo 16.
inline std::vector<Forward> forward_candidates(const Problem& p, const Gpu& gpu, const Tensor& images,
                                               const Tensor& weight) {
    Walk w = make_walk(p, p.strides);
    std::vector<Forward> found;
    auto offer = [&](Road road, bool hopper, const Tile& tile, int chunk) {
        Forward f = sized(p, gpu, w, weight, road, hopper, tile, chunk);
        f.blocks = hopper ? std::min<int64_t>(f.tiles, gpu.multiprocessors) : f.tiles;
        if (f.stages) found.push_back(f);
    };
    int copy_chunk = 0, row_chunk = 0;
    bool copy = no_copy(p, w, images.data, copy_chunk).empty(), rows = no_rows(p, w, images.data, row_chunk).empty();
    if (gpu.arch == 90 && product_step(p) == 16)
        for (const Tile& tile : HOPPER_TILES) {
            if (no_patches(p, w, images.data).empty()) offer(Road::patches, true, tile, 16);
            if (rows && row_chunk >= 4) offer(Road::rows, true, tile, row_chunk);
        }
    if (product_step(p)) {
        for (const Tile& tile : MMA_TILES) {
            if (copy) offer(Road::copy, false, tile, copy_chunk);
            if (rows) offer(Road::rows, false, tile, row_chunk);
        }
        offer(Road::gather, false, MMA_TILES[1], 0);
    } else {
        if (copy && p.compute == Dtype::f32) offer(Road::copy, false, PLAIN_TILES[0], copy_chunk);
        offer(Road::gather, false, PLAIN_TILES[0], 0);
    }
    return found;
}

inline Forward plan_forward(const Problem& p, const Gpu& gpu, const Tensor& images, const Tensor& weight) {
    auto found = forward_candidates(p, gpu, images, weight);
    return *std::min_element(found.begin(), found.end(),
                             [&](const Forward& a, const Forward& b) { return cost_of(a, gpu) < cost_of(b, gpu); });
}

inline std::string describe(const Problem& p) {
    auto by = [](const int64_t (&v)[3]) {
        return std::to_string(v[0]) + "x" + std::to_string(v[1]) + "x" + std::to_string(v[2]);
    };
    const int64_t sizes[3] = {p.F, p.H, p.W};
    return "B=" + std::to_string(p.B) + " C=" + std::to_string(p.C) + " " + by(sizes) + " patch " + by(p.P) +
           " D=" + std::to_string(p.D) + " T=" + std::to_string(p.T);
}

inline const char* name_of(Road road) {
    switch (road) {
        case Road::gather: return "pixels gathered one by one";
        case Road::copy: return "pixels copied asynchronously";
        case Road::rows: return "image rows copied whole";
        default: return "patches cut by the copy engine";
    }
}

// What would happen, for people.
inline std::string how(const Problem& p, const Forward& f) {
    const char* product = f.hopper ? "wgmma" : product_step(p) ? "mma.sync" : "multiply-adds";
    std::string text = name_of(f.road);
    if (f.road == Road::copy || f.road == Road::rows) text += " (" + std::to_string(f.chunk) + " bytes at a time)";
    text += std::string(", ") + product + " in tiles of " + std::to_string(f.tile.BM) + "×" + std::to_string(f.tile.BN);
    if (f.pack) text += ", the weight packed first";
    return text;
}

}  // namespace vk
