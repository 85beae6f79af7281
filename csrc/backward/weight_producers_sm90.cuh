// What the kernel of weight_sm90.cuh is called with, and how the first of its warpgroups brings pixels and dY: by the copy
// engine, or, of the pixels, by its threads. Letters: problem.h.
#pragma once

#include "forward/sm90.cuh"
#include "backward/weight_sm90.h"

namespace vk::backward {

struct WgmmaWeightArguments {
    TensorMap image[MOST_IN_GROUP];  // [C·H, B, G_h, G_w / group, P_w], blocks of [8, BB, BY, BX / group, 16]
    TensorMap grad;                  // [group, B, lines, columns / group, D], blocks of [group, BB, BY, BX / group, 64]
    PatchLayout layout;
    const float* centred;  // [2, C]: m and a of y = (x − m)·a; null: pixels as they are
    float* parts;          // [splits, D, K]
    bool more;             // they are added to those that are there, of the images before
    int64_t D, K, C;
    TileBlock block;       // of a step's patches in the grid
    int copied;            // of them, those that one map brings
    int64_t steps, chunk;  // blocks of patches: all, and of one split
    int64_t work_tiles;    // tiles of all splits, and of all pairs
    int pair_bits;         // 2ᵇ blocks take tiles side by side in k, and share dY, as those of forward/sm90.cuh a weight
    Divisor by_tiles, by_tiles_d, by_across, by_down;  // of a split; in d; of a channel's frame: in x, in y
    int stages;

    // BY_THREADS
    Tensor images, grads, keep;  // [B, C, F, H, W], [B, T + rows, D], [B, rows]
    int64_t B, T, N, grid[2];    // lines, columns
    Divisor by_P_t;
    int bytes;                   // of one copy, 16 or 4
};

// How pixels come to shared memory: by the copy engine, or BY_THREADS; and to wgmma: DIRECT, from where they lie, or
// converted and normalised on their way through registers.
template <class T_, class Pixel_, bool DIRECT_, int BN_, bool BY_THREADS_>
struct WgmmaWeightKernel {
    using T = T_;
    using Pixel = Pixel_;
    static constexpr bool DIRECT = DIRECT_, BY_THREADS = BY_THREADS_;
    static constexpr int BN = BN_, THREADS = 384;
    static constexpr int PRODUCER_REGISTERS = BY_THREADS ? 72 : 40, CONSUMER_REGISTERS = BY_THREADS ? 216 : 232;
    static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS == 3 * 168);  // as in forward/sm90.cuh
    static constexpr int LINE = WGMMA_PIXELS * int(sizeof(Pixel));  // bytes of a patch in a row of pixels
    static constexpr int PIXELS = WGMMA_ROWS * WGMMA_STEP * LINE;
    static constexpr int CHANNELS = WGMMA_STEP * 128, STAGE = PIXELS + BN / 64 * CHANNELS;  // 64 channels; all
};

// A tile of a split. Where rows of pixels are no multiple of 8 the last tile begins within the one before it, as rows
// past the patch may lie past the image; it leaves what that one has to it.
struct WorkTile {
    int64_t split;
    int c, x, y, from, d0;  // elements: channel (and frame), first pixel, first row, and first row that is its own
    int first, stop;        // blocks of patches
};

VK_DEVICE WorkTile work_tile(const WgmmaWeightArguments& h, uint32_t i) {
    WorkTile work;
    uint32_t split = h.by_tiles.div(i), tile = i - split * h.by_tiles.value;
    uint32_t above = h.by_tiles_d.div(tile), tile_k = (above << h.pair_bits) + rank_in_cluster(h.pair_bits);
    uint32_t line = h.by_down.div(tile_k), c = h.by_across.div(line);
    work.split = split;
    work.d0 = static_cast<int>(tile - above * h.by_tiles_d.value);  // in tiles; the caller knows how wide they are
    work.c = static_cast<int>(c), work.x = static_cast<int>(line - c * h.by_across.value) * WGMMA_PIXELS;
    work.from = static_cast<int>(tile_k - line * h.by_down.value) * WGMMA_ROWS;
    work.y = work.from < h.layout.P_h - WGMMA_ROWS ? work.from : h.layout.P_h - WGMMA_ROWS;
    int64_t first = split * h.chunk, stop = first + h.chunk;
    work.first = static_cast<int>(first), work.stop = static_cast<int>(stop < h.steps ? stop : h.steps);
    return work;
}

#if VK_SM90A

template <class K>
VK_DEVICE void copy_grads(const WgmmaWeightArguments& h, char* stage, const WorkTile& work, const int64_t (&origin)[3],
                          Barrier* full) {
    int b = static_cast<int>(origin[0]), y = static_cast<int>(origin[1]);
    int x = static_cast<int>(origin[2]) >> h.block.group, rank = rank_in_cluster(h.pair_bits);
    for (int d = 0; d < K::BN; d += 64) {
        char* channels = stage + K::PIXELS + d / 64 * K::CHANNELS;
        if (h.pair_bits == 0)
            copy_tensor(channels, &h.grad, full, work.d0 * K::BN + d, x, y, b, 0);
        else if (d / 64 % 2 == rank)
            copy_tensor_to_all(channels, &h.grad, full, 2, work.d0 * K::BN + d, x, y, b, 0);
    }
}

template <class K>
VK_DEVICE void produce(const WgmmaWeightArguments& h, char* stages, Barrier* full, Barrier* empty) {
    PipelineState state;
    for (int64_t i = block_index() >> h.pair_bits; i < h.work_tiles; i += block_count() >> h.pair_bits) {
        WorkTile work = work_tile(h, static_cast<uint32_t>(i));
        for (int n = work.first; n < work.stop; ++n) {
            int64_t at[3];
            h.block.origin(n, at);
            int b = static_cast<int>(at[0]), y = static_cast<int>(at[1]), x = static_cast<int>(at[2]) >> h.block.group;
            char* stage = stages + state.stage * K::STAGE;
            barrier_wait(&empty[state.stage], state.phase ^ 1);
            barrier_expect(&full[state.stage], K::STAGE);
            for (int place = 0; place < 1 << h.block.group; ++place)
                copy_tensor(stage + place * WGMMA_ROWS * h.copied * K::LINE, &h.image[place], &full[state.stage],
                            place * h.layout.S_w + work.x, x, y, b, work.c * h.layout.H + work.y);
            copy_grads<K>(h, stage, work, at, &full[state.stage]);
            state.advance(h.stages);
        }
    }
}

// BY_THREADS: patch m of a step
struct CopiedPatch {
    Corner corner;
    int64_t b, i;  // its image, and its row there
    bool there;    // it is a patch
    bool kept;     // and the index that names it is one
};

VK_DEVICE CopiedPatch copied_patch(const WgmmaWeightArguments& h, const int64_t (&origin)[3], int m) {
    CopiedPatch patch;
    int64_t at[3];
    h.block.place(origin, m, at);
    patch.there = at[0] < h.B && at[1] < h.grid[0] && at[2] < h.grid[1];
    patch.b = at[0], patch.i = at[1] * h.grid[1] + at[2];
    int64_t n = patch.i;
    if (h.keep.data && patch.there)
        n = load_index(h.keep.data, h.keep.dtype, patch.b * h.keep.strides[0] + n * h.keep.strides[1]);
    patch.kept = !patch.there || (n >= 0 && n < h.N);
    patch.corner = corner_of(h.layout, patch.there ? patch.b : 0, patch.there && patch.kept ? n : 0);
    return patch;
}

// 16 pixels of rows `row` and `row` + 1 of the tile, of patch m
template <class K, int BYTES>
VK_DEVICE void copy_rows(const WgmmaWeightArguments& h, char* stage, const WorkTile& work, const CopiedPatch& patch,
                         int m, int row) {
    constexpr int EACH = BYTES / int(sizeof(typename K::Pixel));
    const PatchLayout& w = h.layout;
    int c = h.by_P_t.div(work.c), t = work.c - c * w.P_t;
    bool padded = is_padded(w), there = patch.there && patch.kept;
    const char* images = static_cast<const char*>(h.images.data);
#pragma unroll 1
    for (int r = row; r < row + 2; ++r) {
        Element e{c * w.c + t * w.f + (work.y + r) * w.h + work.x, t, work.y + r, work.x};
#pragma unroll
        for (int x = 0; x < WGMMA_PIXELS; x += EACH, e.offset += EACH, e.x += EACH) {
            bool real = there && e.x < w.P_w && (!padded || is_inside(w, patch.corner, e));
            int64_t from = real ? (patch.corner.offset + e.offset) * int(sizeof(typename K::Pixel)) : 0;
            int to = swizzled<K::LINE>((r * WGMMA_STEP + m) * K::LINE + x * int(sizeof(typename K::Pixel)));
            copy_async<BYTES>(stage + to, images + from, real ? BYTES : 0);
        }
    }
}

// dY of a step where an index is none: its row is left out, whatever it holds
template <class K>
VK_DEVICE void copy_grads_of_kept(const WgmmaWeightArguments& h, char* stage, const WorkTile& work,
                                  const int64_t (&origin)[3]) {
#pragma unroll 1
    for (int piece = thread_index(); piece < K::BN / 8 * WGMMA_STEP; piece += 128) {
        int m = piece / 8 % WGMMA_STEP, d = piece / 8 / WGMMA_STEP * 64 + piece % 8 * 8;
        CopiedPatch patch = copied_patch(h, origin, m);
        int64_t channel = int64_t{work.d0} * K::BN + d, left = (h.D - channel) * 2;
        int real = patch.there && patch.kept && left > 0 ? static_cast<int>(left < 16 ? left : 16) : 0;
        int64_t from = real ? patch.b * h.grads.strides[0] + (h.T + patch.i) * h.grads.strides[1] + channel : 0;
        copy_async<16>(stage + K::PIXELS + d / 64 * K::CHANNELS + swizzled<128>(m * 128 + piece % 8 * 16),
                       static_cast<const char*>(h.grads.data) + from * 2, real);
    }
}

template <class K>
VK_DEVICE void produce_by_threads(const WgmmaWeightArguments& h, char* stages, Barrier* full, Barrier* empty) {
    int lane = lane_index(), row = 2 * warp_index();
    PipelineState state;
    for (int64_t i = block_index(); i < h.work_tiles; i += block_count()) {
        WorkTile work = work_tile(h, static_cast<uint32_t>(i));
        for (int n = work.first; n < work.stop; ++n) {
            int64_t at[3];
            h.block.origin(n, at);
            int whole = 1;
            if (h.keep.data) {
                whole = copied_patch(h, at, lane).kept && copied_patch(h, at, lane + 32).kept;
#pragma unroll
                for (int other = 16; other > 0; other /= 2) whole &= shuffle(whole, lane ^ other);
            }
            char* stage = stages + state.stage * K::STAGE;
            Barrier* barrier = &full[state.stage];
            barrier_wait(&empty[state.stage], state.phase ^ 1);
            if (thread_index() == 0) {
                barrier_expect(barrier, whole ? K::STAGE - K::PIXELS : 0);
                if (whole) copy_grads<K>(h, stage, work, at, barrier);
            }
            if (!whole) copy_grads_of_kept<K>(h, stage, work, at);
#pragma unroll 1
            for (int m = lane; m < WGMMA_STEP; m += 32) {
                CopiedPatch patch = copied_patch(h, at, m);
                h.bytes == 16 ? copy_rows<K, 16>(h, stage, work, patch, m, row)
                              : copy_rows<K, 4>(h, stage, work, patch, m, row);
            }
            barrier_arrive_after_copies(barrier);
            state.advance(h.stages);
        }
    }
}

#endif

}  // namespace vk::backward
