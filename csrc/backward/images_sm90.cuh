// The gradient of the images on sm_90a where patches cover them and do not overlap: dX = dY·W by the copy engine and wgmma,
// where images.cuh has any problem and every machine. Letters: problem.h.
//
// It is the forward of sm_90a backwards. A block of three warpgroups stays on its multiprocessor and takes one tile after
// the other: 128 patches, images × lines × columns of the grid, by BN elements of a patch. One thread of the first warpgroup
// brings 64 channels at a time of the patches' dY and of the weight; the other warpgroups multiply 64 patches each. The copy
// engine takes the sums to the image, 16 pixels of a row of a warp's 16 patches at a time: what is past the grid's edge,
// or past a patch's own pixels, lies outside of the map.
#pragma once

#include "backward/images_sm90.h"
#include "backward/weight_sm90.cuh"

namespace vk::backward {

struct WgmmaImagesArguments {
    TensorMap grad;                  // grad_block: [group, B, lines, columns / group, D], blocks of 128 patches × 64 channels
    TensorMap weight;                // [D, K], blocks of [64, 64]
    TensorMap image[MOST_IN_GROUP];  // [C·H, B, G_h, G_w / group, P_w], blocks of 16 patches × 16 pixels
    PatchLayout layout;              // of d_images, padded
    const float* centred;            // [2, C]: m and a of y = (x − m)·a; null: pixels as they are
    float scale;                     // of the sum
    int C;
    TileBlock block;                 // of a tile's patches in the grid
    Divisor by_tiles_k;
    int64_t tiles;                   // of all pairs
    int steps, stages;               // of 64 channels
    int pair_bits;                   // 2ᵇ blocks take tiles side by side in m, and share the weight, as in forward/sm90.cuh
};

template <class T_, class Pixel_, int BN_>
struct WgmmaImagesKernel {
    using T = T_;
    using Pixel = Pixel_;
    static constexpr int BM = 128, BN = BN_, THREADS = 384;
    static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
    static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS == 3 * 168);  // as in forward/sm90.cuh
    static constexpr int GRADS = BM * 128, COLUMNS = 64 * 128, STAGE = GRADS + BN / 64 * COLUMNS;
    static constexpr int LINE = WGMMA_PIXELS * int(sizeof(Pixel)), PIECE = STAGED_ROWS * LINE;  // bytes of one store
    static constexpr int STAGING = STORE_BUFFERS * PIECE;                                      // of a warp
};

#if VK_SM90A

template <class K>
VK_DEVICE void produce_images(const WgmmaImagesArguments& h, char* stages, Barrier* full, Barrier* empty) {
    wait_for_prerequisites();  // of the weight
    PipelineState state;
    for (Tiles tile(h.tiles, h.by_tiles_k, h.pair_bits); tile.is_there(); tile.advance()) {
        int k0 = static_cast<int>(tile.n) * K::BN;
        int64_t at[3];
        h.block.origin(tile.m, at);
        for (int step = 0; step < h.steps; ++step) {
            barrier_wait(&empty[state.stage], state.phase ^ 1);
            Barrier* barrier = &full[state.stage];
            char* stage = stages + state.stage * K::STAGE;
            barrier_expect(barrier, K::STAGE);
            copy_tensor(stage, &h.grad, barrier, step * 64, static_cast<int>(at[2]) >> h.block.group,
                        static_cast<int>(at[1]), static_cast<int>(at[0]), 0);
            for (int k = 0; k < K::BN; k += 64) {
                char* columns = stage + K::GRADS + k / 64 * K::COLUMNS;
                if (h.pair_bits == 0)
                    copy_tensor(columns, &h.weight, barrier, k0 + k, step * 64, 0);
                else if (k / 64 % 2 == rank_in_cluster(h.pair_bits))
                    copy_tensor_to_all(columns, &h.weight, barrier, 2, k0 + k, step * 64, 0);
            }
            state.advance(h.stages);
        }
    }
}

// Sums to the image: those of 16 patches, from element k0 on
template <class K>
VK_DEVICE void store_pixels(const WgmmaImagesArguments& h, const int64_t (&at)[3], int k0, const float (&c)[K::BN / 2],
                            char* staged) {
    int lane = lane_index(), g = lane / 4, t = lane % 4;
    int place = static_cast<int>(at[2]) & ((1 << h.block.group) - 1);
#pragma unroll
    for (int i = 0; i < K::BN / 16; ++i) {
        int k = k0 + 16 * i;
        if (k >= h.layout.K) break;
        char* piece = staged + i % STORE_BUFFERS * K::PIECE;
        if (lane == 0) stores_wait<STORE_BUFFERS - 1>();
        sync_warp();
        float sums[2][4];  // eight elements each: of rows g and g + 8, elements 2t and 2t + 1
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float factor = h.scale;
                if (h.centred) factor *= read_once(h.centred + h.C + channel_of(h.layout, k + 8 * e + 2 * t + j % 2));
                sums[e][j] = c[8 * i + 4 * e + j] * factor;
            }
        if constexpr (same<typename K::Pixel, float>) {
#pragma unroll
            for (int e = 0; e < 2; ++e)
#pragma unroll
                for (int low = 0; low < 2; ++low)
                    store_pair(piece + swizzled<K::LINE>((g + 8 * low) * K::LINE + (2 * e + t / 2) * 16) + t % 2 * 8,
                               sums[e][2 * low], sums[e][2 * low + 1]);
        } else {
            uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                pairs[j] = pack(sums[j / 2][j % 2 * 2], sums[j / 2][j % 2 * 2 + 1], typename K::Pixel{});
            store_matrices(piece + swizzled<K::LINE>(lane % 16 * K::LINE + lane / 16 * 16), pairs);
        }
        fence_copy_engine();
        sync_warp();
        if (lane == 0) {
            int row = h.layout.by_P_w.div(k), channel = h.layout.by_P_h.div(row);
            store_tensor(&h.image[place], piece, place * h.layout.S_w + k - row * h.layout.P_w,
                         static_cast<int>(at[2]) >> h.block.group, static_cast<int>(at[1]), static_cast<int>(at[0]),
                         channel * h.layout.H + row - channel * h.layout.P_h);
            stores_commit();
        }
    }
}

template <class K>
VK_DEVICE void consume_images(const WgmmaImagesArguments& h, const char* stages, char* staging, Barrier* full,
                              Barrier* empty) {
    int warp = warp_index() - 4, row = warp * 16;  // of the tile, the warp's 16
    PipelineState state;
    for (Tiles tile(h.tiles, h.by_tiles_k, h.pair_bits); tile.is_there(); tile.advance()) {
        int k0 = static_cast<int>(tile.n) * K::BN;
        float c[K::BN / 2];
#pragma unroll
        for (int i = 0; i < K::BN / 2; ++i) c[i] = 0;
        auto release = [&](int slot) { release_stage(&empty[slot], h.pair_bits); };
        int before = -1;  // the stage that the products under way may still read
        for (int step = 0; step < h.steps; ++step) {
            barrier_wait(&full[state.stage], state.phase);
            uint32_t grads = shared_address(stages + state.stage * K::STAGE) + row / 64 * (64 * 128);
            uint32_t columns = shared_address(stages + state.stage * K::STAGE) + K::GRADS;
            warpgroup_fence();
#pragma unroll
            for (int d = 0; d < 64; d += 16)
                warpgroup_multiply_add<true, false>(c, matrix_descriptor<128>(grads + d * 2),
                                                    matrix_descriptor_across<128>(columns + d * 128, K::COLUMNS),
                                                    typename K::T{});
            warpgroup_commit();
            warpgroup_wait<1>();  // the stage before has been read
            if (before >= 0) release(before);
            before = state.stage;
            state.advance(h.stages);
        }
        warpgroup_wait<0>();
        release(before);

        int64_t origin[3], at[3];
        h.block.origin(tile.m, origin);
        h.block.place(origin, row, at);
        store_pixels<K>(h, at, k0, c, staging + warp * K::STAGING);
    }
    if (lane_index() == 0) stores_wait<0>();  // shared memory ends with the block
}

#endif

template <class K>
VK_KERNEL(K::THREADS, 1) wgmma_images_kernel(VK_GRID_CONSTANT WgmmaImagesArguments h) {
#if VK_SM90A
    char* stages = shared_memory();  // aligned to 1024 bytes, as the swizzles are
    char* staging = stages + h.stages * K::STAGE;
    Barrier *full = reinterpret_cast<Barrier*>(staging + 8 * K::STAGING), *empty = full + h.stages;
    if (thread_index() == 0) {
        prefetch_map(&h.grad);
        prefetch_map(&h.weight);
        for (int place = 0; place < 1 << h.block.group; ++place) prefetch_map(&h.image[place]);
        for (int i = 0; i < h.stages; ++i) {
            barrier_init(&full[i], 1);                  // the announcement of bytes
            barrier_init(&empty[i], 8 << h.pair_bits);  // the warps that multiply
        }
        barrier_init_done();
    }
    sync_block();
    if (h.pair_bits) sync_cluster();  // as in forward/sm90.cuh
    if (thread_index() < 128) {
        fewer_registers<K::PRODUCER_REGISTERS>();
        if (thread_index() == 0) produce_images<K>(h, stages, full, empty);
    } else {
        more_registers<K::CONSUMER_REGISTERS>();
        consume_images<K>(h, stages, staging, full, empty);
    }
    if (h.pair_bits) sync_cluster();
#else
    stop_with_error();  // it is planned for sm_90 alone, and only where there is code of sm_90a
#endif
}

// The 16 patches of a warp of a tile: whole lines of it, of whole images, or a part of a line
inline TensorBlock pixel_block(const Problem& p, const PatchLayout& w, const int (&tile)[3], int group, int place) {
    int x = std::min(tile[2] / group, STAGED_ROWS), y = std::min(tile[1], STAGED_ROWS / x);
    return image_block(p, w, {STAGED_ROWS / (x * y), y, x * group}, 1, WGMMA_PIXELS, WGMMA_PIXELS * size_of(p.image), group,
                       place);
}

template <class T, class Pixel, int BN>
void launch_wgmma_images(const WgmmaImagesLaunch& l) {
    using K = WgmmaImagesKernel<T, Pixel, BN>;
    const Problem& p = l.p;
    const WgmmaImagesPlan& plan = l.plan;
    WgmmaImagesArguments h{};
    PatchLayout layout = layout_of(p, l.d_images.strides);
    const int64_t grid[2] = {p.G[0] * p.G[1], p.G[2]};
    const char* patches = static_cast<const char*>(l.grad.data) + p.T * l.grad.strides[1] * 2;
    h.grad = make_tensor_map(grad_block(p, l.grad, plan.block, plan.group, grid), patches);
    uint64_t row = static_cast<uint64_t>(plan.weight_row), all = row * 2 * static_cast<uint64_t>(p.D);
    h.weight = make_tensor_map({p.compute, 3, {row, uint64_t(p.D), 1}, {2, row * 2, all}, {64, 64, 1}, 128}, l.weight);
    for (int place = 0; place < plan.group; ++place)
        h.image[place] = make_tensor_map(pixel_block(p, layout, plan.block, plan.group, place), l.d_images.data);
    h.layout = padded(layout);
    h.centred = l.centred, h.scale = static_cast<float>(p.scale), h.C = static_cast<int>(p.C);
    h.block = tile_block(plan.block, plan.group, grid);
    h.by_tiles_k = Divisor(plan.tiles_k), h.tiles = plan.tiles / plan.pair, h.pair_bits = plan.pair - 1;
    h.steps = static_cast<int>(ceil_div(p.D, 64)), h.stages = plan.stages;
    Early packed{l.weight, static_cast<int64_t>(all)};
    launch(wgmma_images_kernel<K>, plan.blocks, K::THREADS, plan.shared_bytes, l.stream, h, "the gradient of the images",
           plan.pair, packed);
}

template <class T>
void launch_images_sm90(const WgmmaImagesLaunch& l) {
    bool single = l.p.image == Dtype::f32;
    if (l.plan.BN == 256)
        return single ? launch_wgmma_images<T, float, 256>(l) : launch_wgmma_images<T, T, 256>(l);
    if (l.plan.BN == 128)
        return single ? launch_wgmma_images<T, float, 128>(l) : launch_wgmma_images<T, T, 128>(l);
    no_kernel(128, l.plan.BN);
}

}  // namespace vk::backward
