// The forward on sm_90a: a block of three warpgroups stays on its multiprocessor and takes one tile after the other. The
// first brings patches and weights, the weights (and where it can the patches) by the copy engine; the other two multiply
// 64 patches × BN channels each with wgmma and write tokens while the next tile is on its way. Letters: problem.h.
//
// Weights lie in shared memory as wgmma reads them. Patches do too where pixels are the operands themselves; otherwise
// the operands are put together in registers, as in sm80.cuh: converted, normalised, or begun at any even pixel.
#pragma once

#include "common/driver.h"
#include "forward/sm80.cuh"

namespace vk {

struct WgmmaArguments {
    TensorMap image;   // patches: [C·H, B, G_h, G_w, P_w], blocks of [stage_rows, BB, BY, BX, BOX]
    TensorMap weight;  // [K / span, D, span], blocks of [step_k / span, BN, span]; span: 16 or 64 elements
    ForwardArguments a;
    int block_bits[3];     // patches: 2ᵇ images × lines × columns of the grid in a tile
    Divisor by_blocks[2];  // of tiles in x, in y
    Divisor by_P_h;    // of a channel's rows
    int64_t prefixes;  // threads that write prefix tokens
};

// How patches come: RowsOf<Pixel>, by the producer's threads; PatchesOf<Pixel, DIRECT>, by the copy engine. DIRECT:
// wgmma reads them where they lie.
template <class Pixel>
struct RowsOf {
    using Stored = Pixel;
    static constexpr bool ENGINE = false, DIRECT = false;
};
template <class Pixel, bool DIRECT_>
struct PatchesOf {
    using Stored = Pixel;
    static constexpr bool ENGINE = true, DIRECT = DIRECT_;
    // Pixels of a row of one box: 16 wgmma's operands; otherwise as many as leave the reads without bank conflicts
    static constexpr int BOX = DIRECT || sizeof(Pixel) == 1 ? 16 : 8;
};

template <class T_, class Loader_, int BN_>
struct WgmmaKernel {
    using T = T_;
    using Loader = Loader_;
    static constexpr int BM = 128, BN = BN_, THREADS = 384;
};

// The stage of the pipeline that comes next, and the phase (parity) of its barriers
struct PipelineState {
    int stage = 0;
    uint32_t phase = 0;

    VK_DEVICE void advance(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

// [x boxes][stage_rows][BM][BOX] pixels, as the copy engine lays them
template <int BM, int BOX>
struct InBoxes {
    Divisor by_P_w;
    int P_w, size, stage_rows;

    VK_DEVICE int row(int r) const { return r * BOX * size; }
    VK_DEVICE int k(int k) const {
        int q = by_P_w.div(k), x = k - q * P_w;
        return ((x / BOX * stage_rows + q) * BM * BOX + x % BOX) * size;
    }
    VK_DEVICE int stage(int k0) const { return by_P_w.div(k0) * BM * BOX * size; }  // it begins with a row
};

// Tile row r of the tile that begins at image b0, line y0, column x0
VK_DEVICE bool block_token(const WgmmaArguments& h, const int64_t (&origin)[3], int r, Token& token) {
    const int(&bits)[3] = h.block_bits;
    int64_t x = origin[2] + (r & ((1 << bits[2]) - 1)), y = origin[1] + (r >> bits[2] & ((1 << bits[1]) - 1));
    int64_t b = origin[0] + (r >> (bits[1] + bits[2]));
    token = {b, y * h.a.layout.G_w + x, y * h.a.layout.G_w + x, true};
    return b < h.a.B && y < h.a.layout.G_h && x < h.a.layout.G_w;
}

VK_DEVICE void block_origin(const WgmmaArguments& h, uint32_t tile, int64_t (&origin)[3]) {
    uint32_t line = h.by_blocks[0].div(tile), images = h.by_blocks[1].div(line);
    origin[0] = int64_t{images} << h.block_bits[0];
    origin[1] = int64_t{line - images * h.by_blocks[1].value} << h.block_bits[1];
    origin[2] = int64_t{tile - line * h.by_blocks[0].value} << h.block_bits[2];
}

#if VK_SM90A

template <class K>
VK_DEVICE void produce(const WgmmaArguments& h, char* stages, char* table, Barrier* full, Barrier* empty) {
    using Pixel = typename K::Loader::Stored;
    constexpr bool ENGINE = K::Loader::ENGINE;
    const ForwardArguments& a = h.a;
    bool leader = thread_index() == 0;
    if (ENGINE && !leader) return;
    int span = a.step_k % 64 == 0 ? 64 : 16;
    int weight_bytes = K::BN * a.step_k * 2, image_bytes = ENGINE ? K::BM * a.step_k * int(sizeof(Pixel)) : 0;
    ImageRows<Pixel> rows(a, table, K::BM, 128);
    PipelineState state;
    for (int64_t tile = block_index(); tile < a.tiles; tile += block_count()) {
        uint32_t tile_m = a.by_tiles_n.div(static_cast<uint32_t>(tile));
        int d0 = static_cast<int>(tile - int64_t{tile_m} * a.by_tiles_n.value) * K::BN;
        int64_t origin[3];
        if constexpr (ENGINE) {
            block_origin(h, tile_m, origin);
        } else {
            sync_some(1, 128);  // the last tile's segments are not read any more
            rows.start(int64_t{tile_m} * K::BM);
            sync_some(1, 128);
        }
        for (int step = 0; step < a.steps; ++step) {
            barrier_wait(&empty[state.stage], state.phase ^ 1);
            char* stage = stages + state.stage * a.stage_bytes;
            if (leader) {
                barrier_expect(&full[state.stage], weight_bytes + image_bytes);
                copy_tensor(stage + a.a_bytes, &h.weight, &full[state.stage], 0, d0, step * (a.step_k / span));
            }
            if constexpr (ENGINE) {
                int row = step * a.stage_rows, c = h.by_P_h.div(row), y = row - c * h.by_P_h.value;
                for (int x = 0; x < a.layout.P_w; x += K::Loader::BOX)
                    copy_tensor(stage + x * a.stage_rows * K::BM * int(sizeof(Pixel)), &h.image, &full[state.stage], x,
                                static_cast<int>(origin[2]), static_cast<int>(origin[1]), static_cast<int>(origin[0]),
                                c * a.layout.H + y);
            } else {
                rows.issue(stage, step);
                barrier_arrive_after_copies(&full[state.stage]);
            }
            state.advance(a.stages);
        }
    }
}

// Registers of a warp's sums, columns 64·part … of the tile, staged as [STAGED_ROWS, 64]
template <int N>
VK_DEVICE void put_sums(const float (&c)[N], int part, float* staged, int pitch) {
    int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
        if (j / 8 == part)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                *reinterpret_cast<Two*>(staged + (g + 8 * h) * pitch + j % 8 * 8 + 2 * t) = {c[4 * j + 2 * h],
                                                                                            c[4 * j + 2 * h + 1]};
}

template <class K>
VK_DEVICE void consume(const WgmmaArguments& h, const char* stages, float* staging, Barrier* full, Barrier* empty) {
    using T = typename K::T;
    using Loader = typename K::Loader;
    using Pixel = typename Loader::Stored;
    const ForwardArguments& a = h.a;
    int warp = warp_index() - 4, row = warp * 16;  // of the tile, the warp's 16
    bool wide = a.step_k % 64 == 0;
    auto offset_of = [&](int i) {  // DIRECT: of 16 elements of k in a stage of patches
        int across = a.layout.P_w / 16;
        return (i % across * a.stage_rows + i / across) * (K::BM * 32);
    };
    int part_offset[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) part_offset[i] = Loader::DIRECT ? offset_of(i) : 0;
    float* staged = staging + warp * STAGED_ROWS * (64 + 4);
    PipelineState state;
    for (int64_t tile = block_index(); tile < a.tiles; tile += block_count()) {
        uint32_t tile_m = a.by_tiles_n.div(static_cast<uint32_t>(tile));
        int64_t d0 = (tile - int64_t{tile_m} * a.by_tiles_n.value) * K::BN, m0 = int64_t{tile_m} * K::BM;
        float c[K::BN / 2];
#pragma unroll
        for (int i = 0; i < K::BN / 2; ++i) c[i] = 0;
        auto release = [&](int slot) {
            sync_warp();
            if (lane_index() == 0) barrier_arrive(&empty[slot]);
        };
        auto place = [&] {
            if constexpr (Loader::ENGINE)
                return InBoxes<K::BM, Loader::BOX>{a.layout.by_P_w, a.layout.P_w, int(sizeof(Pixel)), a.stage_rows};
            else
                return ImageRows<Pixel>(a, nullptr, K::BM, 128).place(m0);
        }();
        Pixels<T, Pixel, decltype(place), 16> pixels(a, place, row);
        int before = -1;          // the stage that the group under way may still read
        uint32_t operands[2][4];  // two, as one is being read by the tensor cores
        for (int step = 0; step < a.steps; ++step) {
            barrier_wait(&full[state.stage], state.phase);
            const char* stage = stages + state.stage * a.stage_bytes;
            uint32_t patches = shared_address(stage) + row / 64 * (64 * 32), at = shared_address(stage) + a.a_bytes;
            int left = a.layout.K - step * a.step_k, parts = ((left < a.step_k ? left : a.step_k) + 15) / 16;
            auto weight = [&](int i) {  // 16 elements of k of all BN channels
                return wide ? matrix_descriptor<128>(at + i / 4 * (K::BN * 128) + i % 4 * 32)
                            : matrix_descriptor<32>(at + i * (K::BN * 32));
            };
            if constexpr (Loader::DIRECT) {
                if (wide && parts == 4) {  // a group without a branch in it: else the compiler waits for each part
                    uint64_t weights = matrix_descriptor<128>(at);
                    warpgroup_fence();
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        warpgroup_multiply_add(c, matrix_descriptor<32>(patches + part_offset[i]), weights + 2 * i, T{});
                    warpgroup_commit();
                    warpgroup_wait<1>();
                } else {
                    warpgroup_fence();
                    for (int i = 0; i < parts; ++i)
                        warpgroup_multiply_add(c, matrix_descriptor<32>(patches + offset_of(i)), weight(i), T{});
                    warpgroup_commit();
                    warpgroup_wait<1>();
                }
            } else {
                pixels.enter(stage, step * a.step_k);
                for (int i = 0; i < parts; i += 2)
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd)
                        if (i + odd < parts) {
                            pixels.fragment(operands[odd], row, 16 * (i + odd));
                            warpgroup_fence();
                            warpgroup_multiply_add(c, operands[odd], weight(i + odd), T{});
                            warpgroup_commit();
                            warpgroup_wait<1>();
                        } else {
                            warpgroup_wait<0>();  // operands[0] are written next, and must not be while they are read
                        }
            }
            // The last group goes on while the next stage is awaited: then the stage before is free. But of two stages
            // the producer waits for this very one.
            bool drained = !Loader::DIRECT && a.stages == 2;
            if (drained) warpgroup_wait<0>();
            if (before >= 0) release(before);
            before = state.stage;
            if (drained) release(before), before = -1;
            state.advance(a.stages);
        }
        warpgroup_wait<0>();
        if (before >= 0) release(before);

        int64_t origin[3];
        if constexpr (Loader::ENGINE) block_origin(h, tile_m, origin);
#pragma unroll
        for (int part = 0; part < K::BN / 64; ++part) {
            put_sums(c, part, staged, 64 + 4);
            sync_warp();
            write_staged<64>(a, staged, 64 + 4, d0 + part * 64, [&](int r, Token& token) {
                if constexpr (Loader::ENGINE) return block_token(h, origin, row + r, token);
                int64_t m = m0 + row + r;
                if (m >= a.M) return false;
                token = token_of(a, m);
                return true;
            });
            sync_warp();
        }
    }
    for (int64_t at = block_index() * 256 + thread_index() - 128; at < h.prefixes; at += block_count() * 256)
        write_prefix<float>(a, at);
}

#endif

template <class K>
VK_KERNEL(K::THREADS, 1) wgmma_kernel(VK_GRID_CONSTANT WgmmaArguments h) {
#if VK_SM90A
    const ForwardArguments& a = h.a;
    char* stages = shared_memory();  // aligned to 1024 bytes, as the swizzles are
    float* staging = reinterpret_cast<float*>(stages + a.stages * a.stage_bytes);
    char* table = reinterpret_cast<char*>(staging + 8 * STAGED_ROWS * (64 + 4));
    Barrier* full = reinterpret_cast<Barrier*>(table + a.table_bytes);
    Barrier* empty = full + a.stages;
    if (thread_index() == 0) {
        prefetch_map(&h.weight);
        if (K::Loader::ENGINE) prefetch_map(&h.image);
        for (int i = 0; i < a.stages; ++i) {
            barrier_init(&full[i], K::Loader::ENGINE ? 1 : 129);  // the announcement of bytes, the producer's copies
            barrier_init(&empty[i], 8);                           // the consumers' warps
        }
        barrier_init_done();
    }
    sync_block();
    if (thread_index() < 128) {
        fewer_registers<40>();
        produce<K>(h, stages, table, full, empty);
    } else {
        more_registers<232>();
        consume<K>(h, stages, staging, full, empty);
    }
#else
    stop_with_error();  // it is planned for sm_90 alone, and only where there is code of sm_90a
#endif
}

// From a plan to an instantiated kernel, with its tensor maps

// [C·H, B, G_h, G_w, P_w], a channels-last image being one channel; the innermost first
inline TensorBlock image_block(const Problem& p, const PatchLayout& w, const int (&block)[3], int rows, int box, int swizzle) {
    uint64_t size = size_of(p.image), lines = (w.channels_last ? 1 : p.C) * p.H;
    auto bytes = [&](int64_t elements) { return static_cast<uint64_t>(elements) * size; };
    // One image, line or row has no next: any stride that the driver takes.
    uint64_t line = bytes(w.S_h * w.h), image = p.B > 1 ? bytes(w.b) : line;
    return {p.image, 5,
            {uint64_t(w.P_w), uint64_t(p.G[2]), uint64_t(p.G[1]), uint64_t(p.B), lines},
            {size, bytes(w.S_w), line, image, bytes(w.h)},
            {uint32_t(box), uint32_t(block[2]), uint32_t(block[1]), uint32_t(block[0]), uint32_t(rows)},
            swizzle};
}

// [K / span, D, span]
inline TensorBlock weight_block(const Problem& p, const ForwardPlan& f) {
    uint64_t size = size_of(p.compute), span = f.step_k % 64 == 0 ? 64 : 16;
    return {p.compute, 3,
            {span, uint64_t(p.D), uint64_t(ceil_div(p.K, int64_t(span)))},
            {size, uint64_t(f.weight_row) * size, span * size},
            {uint32_t(span), uint32_t(f.BN), uint32_t(f.step_k / span)},
            static_cast<int>(span * size)};
}

template <class T, class Loader, int BN>
void launch_wgmma(const ForwardLaunch& l) {
    using K = WgmmaKernel<T, Loader, BN>;
    const Problem& p = l.p;
    WgmmaArguments h{};
    h.a = l.arguments;
    h.weight = make_tensor_map(weight_block(p, l.plan), l.arguments.weight);
    if constexpr (Loader::ENGINE) {
        TensorBlock image = image_block(p, l.arguments.layout, l.plan.block, l.plan.stage_rows, Loader::BOX,
                                        Loader::DIRECT ? 32 : 0);
        h.image = make_tensor_map(image, l.arguments.images);
        for (int i = 0; i < 3; ++i)
            while (1 << h.block_bits[i] < l.plan.block[i]) ++h.block_bits[i];
        h.by_blocks[0] = Divisor(ceil_div(p.G[2], l.plan.block[2]));
        h.by_blocks[1] = Divisor(ceil_div(p.G[1], l.plan.block[1]));
        h.by_P_h = Divisor(p.P[1]);
    }
    h.prefixes = l.prefixes;
    launch(wgmma_kernel<K>, l.plan.blocks, K::THREADS, l.plan.shared_bytes, l.stream, h, "the forward");
}

template <class T, class Loader>
void launch_wgmma_tile(const ForwardLaunch& l) {
    if (l.plan.BM == 128 && l.plan.BN == 256) return launch_wgmma<T, Loader, 256>(l);
    if (l.plan.BM == 128 && l.plan.BN == 128) return launch_wgmma<T, Loader, 128>(l);
    no_kernel(l.plan.BM, l.plan.BN);
}

template <class T>
void launch_sm90(const ForwardLaunch& l) {
    bool patches = l.plan.loader == LoaderKind::patches;
    auto of = [&](auto as_patches, auto as_rows) {
        patches ? launch_wgmma_tile<T, decltype(as_patches)>(l) : launch_wgmma_tile<T, decltype(as_rows)>(l);
    };
    if (l.p.image == Dtype::u8) return of(PatchesOf<uint8_t, false>{}, RowsOf<uint8_t>{});
    if (l.p.image == Dtype::f32) return of(PatchesOf<float, false>{}, RowsOf<float>{});
    l.arguments.centred ? of(PatchesOf<T, false>{}, RowsOf<T>{}) : of(PatchesOf<T, true>{}, RowsOf<T>{});
}

}  // namespace vk
