// The forward on sm_90a: a block of three warpgroups stays on its multiprocessor and takes one tile after the other. The
// first brings patches and weights, the weights (and where it can the patches) by the copy engine; the other two multiply
// 64 patches × BN channels each with wgmma and write tokens (epilogue_sm90.cuh) while the next tile is on its way.
// Letters: problem.h.
//
// The second of these two begins some steps after the first and stays behind: while one writes its tokens, the other has
// the tensor cores to itself.
//
// Weights lie in shared memory as wgmma reads them. Patches do too where pixels are the operands themselves; otherwise
// the operands are put together in registers (operands_sm90.cuh): converted, normalised, or begun at any even pixel; of
// float32 as one term of TF32, or as two (tf32x3).
//
// A tensor map has patches that begin on 16 bytes. Those of 14 pixels of 16 bits are 28 bytes apart, and one of 4 does:
// the copy engine brings a group of 4 by 4 maps, each of which ends with its patch, so that what is past it up to a
// multiple of 16 pixels arrives as zeros; the weight is packed to match. A tile's patches are ordered by their place in
// the group first, and each row of pixels is a copy of its own, as the places of one row lie one behind the other.
//
// Where two blocks make a cluster, they multiply different patches by the same weights, of which each brings half for
// both: a stage is free when the consumers of both have read it. Or two or four divide the k of one tile.
//
// Patches that no map describes (kept ones, of a video, of a padded image, of rows of any length) are copied into the
// same places by the first warpgroup's threads, 16 or 4 bytes at a time.
#pragma once

#include "forward/operands_sm90.cuh"

namespace vk {

#if VK_SM90A

template <bool FIRST, class A, class B>
VK_DEVICE auto& pick(A& first, B& second) {
    if constexpr (FIRST)
        return first;
    else
        return second;
}

template <class K>
VK_DEVICE void consume(const WgmmaArguments& h, char* stages, char* staging, const float* table,
                       const Barriers& barriers, const float* constants) {
    using T = typename K::T;
    using Loader = typename K::Loader;
    const ForwardArguments& a = h.a;
    constexpr int STEP = Kind<T>::K_STEP;  // 32 bytes of k
    int warp = warp_index() - 4, row = warp * 16;  // of the tile, the warp's 16
    bool wide = is_wide(a.step_k, sizeof(typename K::Value));
    int offsets[4] = {};
    if constexpr (Loader::DIRECT)
#pragma unroll
        for (int i = 0; i < 4; ++i) offsets[i] = part_offset<K>(a, i);
    char* staged = staging + warp * K::STAGING;
    PipelineState state;
    uint32_t table_phase = 0;
    int meet_at = K::STORES && a.lag ? (warp < 4 ? a.lag : 0) : -1;  // the step of the first tile
    for (Tiles tile = tiles_of<K>(h); tile.is_there(); tile.advance()) {
        int64_t d0 = int64_t{tile.n} * K::BN, m0 = int64_t{tile.m} * K::BM;
        // Tensor cores cut off what a sum can't hold, which adds up in one direction (Ootomo and Yokota 2022, "Recovering
        // single precision accuracy from Tensor Cores"): in float32 they add up no more than a stage.
        float c[K::BN / 2], of_stage[K::TERMS == 2 ? K::BN / 2 : 1];
        auto& sums = pick<K::TERMS == 2>(of_stage, c);
#pragma unroll
        for (int i = 0; i < K::BN / 2; ++i) c[i] = sums[i] = 0;
        auto release = [&](int slot) { release_stage(&barriers.empty[slot], pair_bits<K>(h)); };
        auto pixels = [&] {
            if constexpr (Loader::DIRECT)
                return 0;
            else if constexpr (Loader::BLOCKS)
                return BoxedPixels<K>(a, constants, row);
            else
                return RowPixels<K>(a, m0, row);
        }();
        int before = -1;  // the stage that the group under way may still read
        uint32_t operands[2][K::TERMS][4];  // two, as one is being read by the tensor cores
        int part = rank_in_cluster(split_bits<K>(h));
        for (int step = first_step<K>(h, part); step < first_step<K>(h, part + 1); ++step) {
            if (step == meet_at) sync_some(2, 256), meet_at = -1;
            barrier_wait(&barriers.full[state.stage], state.phase);
            // wgmma reads as the copy engine does what threads have copied
            if constexpr (Loader::DIRECT && Loader::BY_THREADS) fence_copy_engine();
            const char* stage = stages + state.stage * a.stage_bytes;
            uint32_t patches = shared_address(stage) + row / 64 * (64 * 32), at = shared_address(stage) + a.a_bytes;
            int left = a.layout.K - step * a.step_k, parts = ((left < a.step_k ? left : a.step_k) + STEP - 1) / STEP;
            uint64_t weights = wide ? matrix_descriptor<128>(at) : matrix_descriptor<32>(at);
            uint32_t next_part = wide ? 2 : K::BN * 2, next_term = K::BN * a.step_k * sizeof(typename K::Value) / 16;
            auto weight = [&](int first, int i) {  // of part first + i, all BN channels; `first` is a multiple of 4
                return weights + first * (K::BN * 2) + i * next_part;
            };
            if constexpr (Loader::DIRECT) {
                if (wide && parts == 4) {  // a group without a branch in it: else the compiler waits for each part
                    warpgroup_fence();
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        warpgroup_multiply_add(sums, matrix_descriptor<32>(patches + offsets[i]), weights + 2 * i, T{});
                    warpgroup_commit();
                    warpgroup_wait<1>();
                } else {
                    warpgroup_fence();
                    for (int i = 0; i < parts; ++i)
                        warpgroup_multiply_add(sums, matrix_descriptor<32>(patches + part_offset<K>(a, i)),
                                               weight(i & -4, i & 3), T{});
                    warpgroup_commit();
                    warpgroup_wait<1>();
                }
            } else {
                pixels.enter(stage, step * a.step_k);
                for (int first = 0; first < parts; first += 4)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (first + i < parts) {
                            auto& terms = operands[i % 2];
                            pixels(terms[0], first, i);
                            if constexpr (K::TERMS == 2) divide(terms[0], terms[1]);
                            warpgroup_fence();
                            if constexpr (K::TERMS == 2) {  // what is small first; rest times rest is below rounding
                                warpgroup_multiply_add(sums, terms[1], weight(first, i), typename K::Value{});
                                warpgroup_multiply_add(sums, terms[0], weight(first, i) + next_term, typename K::Value{});
                            }
                            warpgroup_multiply_add(sums, terms[0], weight(first, i), typename K::Value{});
                            warpgroup_commit();
                            warpgroup_wait<1>();
                        } else {
                            warpgroup_wait<0>();  // operands[0] are written next, and must not be while they are read
                        }
            }
            // The last group goes on while the next stage is awaited: then the stage before is free. But of two stages
            // the producer waits for this very one.
            bool drained = K::TERMS == 2 || (!Loader::DIRECT && a.stages == 2);
            if (drained) warpgroup_wait<0>();
            if constexpr (K::TERMS == 2)
#pragma unroll
                for (int i = 0; i < K::BN / 2; ++i) c[i] += of_stage[i], of_stage[i] = 0;
            if (before >= 0) release(before);
            before = state.stage;
            if (drained) release(before), before = -1;
            state.advance(a.stages);
        }
        warpgroup_wait<0>();
        if (before >= 0) release(before);

        int64_t origin[3];
        if constexpr (Loader::BLOCKS) h.block.origin(tile.m, origin);
        int channels = K::BN >> split_bits<K>(h), first = part * channels;  // of the tile's, those of this block
        if constexpr (K::SPLITS) {
            if (h.split_bits == 1) add_up<1>(c, part, warp, stages);
            if (h.split_bits == 2) add_up<2>(c, part, warp, stages);
        }
        if constexpr (K::STORES) {
            float scale = static_cast<float>(a.scale), scales[2] = {scale, scale};
            if (Loader::BY_THREADS && a.own_positions) {
                Token token;
                token_at(h, origin, row + lane_index() % 16, token);
                add_positions<typename K::Value>(a, token, d0, c, scales);
            }
            barrier_wait(barriers.table_full, table_phase);
            table_phase ^= 1;
            a.out.dtype == Dtype::f32
                ? store_tokens<float>(a, h.block, origin, d0 + first, row, c, scales, table + first, staged, &h.tokens,
                                      channels)
                : store_tokens<typename K::Value>(a, h.block, origin, d0 + first, row, c, scales, table + first, staged,
                                                  &h.tokens, channels);
            sync_warp();
            if (lane_index() == 0) barrier_arrive(barriers.table_empty);
        } else {
            write_tokens(a, c, reinterpret_cast<float*>(staged), d0, [&](int r, Token& token) {
                if constexpr (Loader::BLOCKS) {
                    return token_at(h, origin, row + r, token);
                } else {
                    int64_t m = m0 + row + r;
                    if (m >= a.M) return false;
                    token = token_of(a, m);
                    return true;
                }
            });
        }
    }
    if constexpr (K::STORES) {
        if (lane_index() == 0) stores_wait<0>();  // shared memory ends with the block
    } else {
        for (int64_t at = block_index() * 256 + thread_index() - 128; at < h.prefixes; at += block_count() * 256)
            write_prefix<float>(a, at);
    }
}

#endif

template <class K>
VK_KERNEL(K::THREADS, 1) wgmma_kernel(VK_GRID_CONSTANT WgmmaArguments h) {
#if VK_SM90A
    const ForwardArguments& a = h.a;
    char* stages = shared_memory();  // aligned to 1024 bytes, as the swizzles are
    char *staging = stages + a.stages * a.stage_bytes, *table = staging + 8 * K::STAGING;
    Barrier* full = reinterpret_cast<Barrier*>(table + a.table_bytes);
    Barriers barriers{full, full + a.stages, full + 2 * a.stages, full + 2 * a.stages + 1};
    if (thread_index() == 0) {
        prefetch_map(&h.weight);
        for (int place = 0; !K::Loader::BY_THREADS && place < 1 << h.block.group; ++place)
            prefetch_map(&h.image[place]);
        if (K::STORES) prefetch_map(&h.tokens);
        for (int i = 0; i < a.stages; ++i) {
            barrier_init(&barriers.full[i], K::Loader::BY_THREADS ? 129 : 1);  // announced bytes, the producer's copies
            barrier_init(&barriers.empty[i], 8 << pair_bits<K>(h));            // the consumers' warps
        }
        if (K::STORES) barrier_init(barriers.table_full, K::Loader::BY_THREADS ? 128 : BESIDE);
        if (K::STORES) barrier_init(barriers.table_empty, 8);
        barrier_init_done();
    }
    float* constants = reinterpret_cast<float*>(barriers.table_empty + 1);
    if constexpr (K::Loader::BLOCKS && !K::Loader::DIRECT) fill_constants<K>(a, constants);
    sync_block();
    if (pair_bits<K>(h)) sync_cluster();  // none arrives at a barrier that is not there
    if (thread_index() < 128) {
        fewer_registers<K::PRODUCER_REGISTERS>();
        if constexpr (K::Loader::BLOCKS && K::Loader::BY_THREADS)
            produce_by_threads<K>(h, stages, reinterpret_cast<float*>(table), barriers);
        else if (K::STORES && thread_index() >= 32)
            add_beside<K>(h, reinterpret_cast<float*>(table), barriers);
        else
            produce<K>(h, stages, table, barriers);
        if (split_bits<K>(h)) sync_cluster();  // as add_up does
    } else {
        more_registers<K::CONSUMER_REGISTERS>();
        consume<K>(h, stages, staging, reinterpret_cast<const float*>(table), barriers, constants);
    }
    if (pair_bits<K>(h) || split_bits<K>(h)) sync_cluster();  // nor at one that is not there any more, nor reads of such memory
#else
    stop_with_error();  // it is planned for sm_90 alone, and only where there is code of sm_90a
#endif
}

// From a plan to an instantiated kernel, with its tensor maps

// [C·H, B, G_h, G_w, P_w], a channels-last image being one channel; the innermost first. Of every `group` patches of a
// line, which begin on 16 bytes together, the map has the one at `place`: its pixels lie behind those before it, and what
// is behind them lies outside.
inline TensorBlock image_block(const Problem& p, const PatchLayout& w, const int (&block)[3], int rows, int box,
                               int swizzle, int group = 1, int place = 0) {
    uint64_t size = size_of(p.image), lines = (w.channels_last ? 1 : p.C) * p.H;
    auto bytes = [&](int64_t elements) { return static_cast<uint64_t>(elements) * size; };
    // One image, line or row has no next: any stride that the driver takes.
    uint64_t line = bytes(w.S_h * w.h), image = p.B > 1 ? bytes(w.b) : line;
    return {p.image, 5,
            {uint64_t(place * w.S_w + w.P_w), uint64_t(p.G[2] / group), uint64_t(p.G[1]), uint64_t(p.B), lines},
            {size, bytes(group * w.S_w), line, image, bytes(w.h)},
            {uint32_t(box), uint32_t(block[2] / group), uint32_t(block[1]), uint32_t(block[0]), uint32_t(rows)},
            swizzle};
}

// [K / span, D, span]
inline TensorBlock weight_block(const Problem& p, const ForwardPlan& f) {
    uint64_t size = size_of(p.compute), span = span_of(f.step_k, int(size));
    return {p.compute, 3,
            {span, uint64_t(p.D), uint64_t(f.pack ? f.weight_row : p.K) / span},
            {size, uint64_t(f.weight_row) * size, span * size},
            {uint32_t(span), uint32_t(f.BN / f.pair()), uint32_t(f.pair() == 1 ? f.step_k / span : 1)},
            static_cast<int>(span * size)};
}

// [group, B, lines, columns / group, D], the tokens behind the prefix; blocks of a warp's 16 rows of a tile
inline TensorBlock token_block(const Problem& p, const int (&tile)[3], int group) {
    uint64_t size = size_of(p.out), row = size * uint64_t(p.D), image = row * uint64_t(p.T + p.rows);
    int x = std::min(tile[2] / group, STAGED_ROWS), y = std::min(tile[1], STAGED_ROWS / x);
    return {p.out, 5,
            {uint64_t(p.D), uint64_t(columns_of(p) / group), uint64_t(lines_of(p)), uint64_t(p.B), uint64_t(group)},
            {size, row * uint64_t(group), row * uint64_t(columns_of(p)), image, row},
            {uint32_t(STORE_ROW / size), uint32_t(x), uint32_t(y), uint32_t(STAGED_ROWS / (x * y)), 1},
            STORE_ROW};
}

template <class T, class Loader, int BN, bool STORES>
void launch_wgmma(const ForwardLaunch& l) {
    using K = WgmmaKernel<T, Loader, BN, STORES>;
    const Problem& p = l.p;
    WgmmaArguments h{};
    h.a = l.arguments;
    h.weight = make_tensor_map(weight_block(p, l.plan), l.arguments.weight);
    if constexpr (Loader::BLOCKS) {
        const PatchLayout& layout = l.arguments.layout;
        int group = l.plan.group, rows = group == 1 ? l.plan.stage_rows : 1, swizzle = Loader::DIRECT ? 32 : 0;
        for (int place = 0; !Loader::BY_THREADS && place < group; ++place)
            h.image[place] = make_tensor_map(
                image_block(p, layout, l.plan.block, rows, Loader::BOX, swizzle, group, place), l.arguments.images);
        h.a.layout = padded(layout);
        h.grid[0] = lines_of(p), h.grid[1] = columns_of(p);
        h.block = tile_block(l.plan.block, group, h.grid);
        h.by_P_t = Divisor(p.P[0]), h.P_w = layout.P_w;
        h.by_P_h = Divisor(p.P[1]);
    }
    if constexpr (STORES) {
        const char* first = static_cast<const char*>(l.arguments.out.data) + p.T * p.D * size_of(p.out);
        h.tokens = make_tensor_map(token_block(p, l.plan.block, l.plan.group), first);
    }
    h.prefixes = l.prefixes;
    while (1 << h.pair_bits < l.plan.pair()) ++h.pair_bits;
    while (1 << h.split_bits < l.plan.splits) ++h.split_bits;
    Early packed{l.arguments.weight, l.plan.pack ? p.D * l.plan.weight_row * size_of(p.compute) : 0};
    launch(wgmma_kernel<K>, l.plan.blocks, K::THREADS, l.plan.shared_bytes, l.stream, h, "the forward", l.plan.cluster,
           packed);
}

// Of forward_plan.py's tiles those that it offers
template <class T, class Pixel, bool DIRECT>
void launch_wgmma_tile(const ForwardLaunch& l) {
    using Engine = PatchesOf<Pixel, DIRECT, false>;
    using Threads = PatchesOf<Pixel, DIRECT, true>;
    constexpr bool FLOAT32 = same<T, tf32x3>;  // whose sums take twice the registers
    switch (l.plan.loader) {
        case LoaderKind::engine:
            if constexpr (!FLOAT32) {
                if (l.plan.BN == 256) return launch_wgmma<T, Engine, 256, true>(l);
                if (l.plan.BN == 192) return launch_wgmma<T, Engine, 192, true>(l);
            }
            if (l.plan.BN == 128) return launch_wgmma<T, Engine, 128, true>(l);
            if (l.plan.BN == 64) return launch_wgmma<T, Engine, 64, true>(l);
            break;
        case LoaderKind::stored:
            if constexpr (FLOAT32) {
                if (l.plan.BN == 128) return launch_wgmma<T, Threads, 128, true>(l);
            } else {
                if (l.plan.BN == 256) return launch_wgmma<T, Threads, 256, true>(l);
                if (l.plan.BN == 192) return launch_wgmma<T, Threads, 192, true>(l);
            }
            break;
        case LoaderKind::copied:
            if (l.plan.BN == 128) return launch_wgmma<T, Threads, 128, false>(l);
            break;
        default:
            if constexpr (same<Pixel, uint8_t> && Kind<T>::K_STEP == 16) {
                if (l.plan.BN == 256) return launch_wgmma<T, RowsOf<Pixel>, 256, false>(l);
                if (l.plan.BN == 128) return launch_wgmma<T, RowsOf<Pixel>, 128, false>(l);
            }
    }
    no_kernel(l.plan.BM, l.plan.BN);
}

template <class T>
void launch_sm90(const ForwardLaunch& l) {
    if (l.p.image == Dtype::u8) return launch_wgmma_tile<T, uint8_t, false>(l);
    if (l.p.image == Dtype::f32) return launch_wgmma_tile<T, float, false>(l);
    if constexpr (Kind<T>::K_STEP == 16)
        l.arguments.centred ? launch_wgmma_tile<T, T, false>(l) : launch_wgmma_tile<T, T, true>(l);
}

}  // namespace vk
