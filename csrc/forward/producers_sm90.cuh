// What the kernel of sm90.cuh is called with, and how the first of its warpgroups brings patches and weights: by the copy
// engine, or by its threads. Letters: problem.h.
#pragma once

#include "common/driver.h"
#include "forward/epilogue_sm90.cuh"

namespace vk {

struct WgmmaArguments {
    // engine: [C·H, B, G_h, G_w / group, P_w], blocks of [stage_rows, BB, BY, BX / group, BOX], of one row where
    // there is a group
    TensorMap image[MOST_IN_GROUP];
    TensorMap weight;  // [weight_row / span, D, span], blocks of [step_k / span, BN, span] (span_of)
    TensorMap tokens;  // stored, engine: [group, B, lines, columns / group, D], blocks of 16 patches × STORE_ROW bytes
    ForwardArguments a;
    int64_t prefixes;  // threads that write prefix tokens
    int pair_bits;     // STORES: 2ᵇ blocks make a cluster, and share the weight
    int split_bits;    // SPLITS: or divide k of a tile

    // Where tiles are blocks of the grid (copied, stored, engine): there the layout of `a` is padded
    TileBlock block;
    int64_t grid[2];         // lines of all frames, columns; of a keep list: one line
    Divisor by_P_h, by_P_t;  // of a frame's rows, of a channel's frames
    int P_w;                 // a patch's own
};

// How patches come: RowsOf<Pixel>, rows of the image by the producer's threads; PatchesOf<Pixel, DIRECT, BY_THREADS>,
// blocks of the grid by the copy engine, or by the threads. DIRECT: wgmma reads them where they lie.
template <class Pixel>
struct RowsOf {
    using Stored = Pixel;
    static constexpr bool BLOCKS = false, DIRECT = false, BY_THREADS = true;
};
template <class Pixel, bool DIRECT_, bool BY_THREADS_>
struct PatchesOf {
    using Stored = Pixel;
    static constexpr bool BLOCKS = true, DIRECT = DIRECT_, BY_THREADS = BY_THREADS_;
    // Pixels of a row of one box: 16 wgmma's operands; otherwise as many as leave the reads without bank conflicts
    static constexpr int BOX = DIRECT || sizeof(Pixel) == 1 ? 16 : 8;
};

// STORES: the copy engine takes tokens to memory
template <class T_, class Loader_, int BN_, bool STORES_>
struct WgmmaKernel {
    using T = T_;
    using Value = typename Kind<T>::Value;
    using Loader = Loader_;
    static constexpr int BM = 128, BN = BN_, THREADS = 384;
    // tf32x3: a row of the weight, and a stage of it, has what TF32 holds of each element, and then of each the rest.
    static constexpr int TERMS = same<T, tf32x3> ? 2 : 1;
    static constexpr bool STORES = STORES_, SPLITS = STORES && BN <= 128 && !Loader::BY_THREADS;
    // Of a thread of the producer, which adds beside where it STORES, and of the consumers: of the 168 that each has at
    // the launch, as setmaxnreg would wait for more for ever.
    static constexpr int PRODUCER_REGISTERS = STORES ? 72 : 40, CONSUMER_REGISTERS = STORES ? 216 : 232;
    static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS == 3 * 168);
    static constexpr int STAGING = STORES ? STORE_BUFFERS * STORE_BYTES : STAGED_ROWS * (64 + 4) * 4;  // bytes of a warp
};

struct Barriers {
    Barrier *full, *empty;              // of the stages
    Barrier *table_full, *table_empty;  // STORES: what is added to a tile's sums
};

// The stage of the pipeline that comes next, and the phase (parity) of its barriers
struct PipelineState {
    int stage = 0;
    uint32_t phase = 0;

    VK_DEVICE void advance(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

VK_DEVICE int rank_in_cluster(int bits) { return static_cast<int>(block_index()) & ((1 << bits) - 1); }  // of 2ᵇ blocks

template <class K>
VK_DEVICE int pair_bits(const WgmmaArguments& h) { return K::STORES ? h.pair_bits : 0; }
template <class K>
VK_DEVICE int split_bits(const WgmmaArguments& h) { return K::SPLITS ? h.split_bits : 0; }

// The tiles that a block takes, one after the other. The blocks of a pair take two that lie side by side in m and have n
// in common, and so one operand: each brings its part of that, and both get it. (A tile past the last patch costs the
// time of its product.) Blocks that split a tile all take it.
struct Tiles {
    int64_t count;  // of a cluster
    const Divisor& by_n;
    int pair_bits, cluster_bits;
    int64_t tile;
    uint32_t m = 0, n = 0;

    VK_DEVICE Tiles(int64_t count, const Divisor& by_n, int pair_bits, int split_bits = 0)
        : count(count), by_n(by_n), pair_bits(pair_bits), cluster_bits(pair_bits | split_bits),
          tile(block_index() >> cluster_bits) {}
    VK_DEVICE bool is_there() {
        if (tile >= count) return false;
        uint32_t above = by_n.div(static_cast<uint32_t>(tile));
        m = (above << pair_bits) + rank_in_cluster(pair_bits);
        n = static_cast<uint32_t>(tile) - above * by_n.value;
        return true;
    }
    VK_DEVICE void advance() { tile += block_count() >> cluster_bits; }
};

template <class K>
VK_DEVICE Tiles tiles_of(const WgmmaArguments& h) {
    return {h.a.tiles, h.a.by_tiles_n, pair_bits<K>(h), split_bits<K>(h)};
}

// The first step of k of part `i` of a tile, of as many as blocks split it
template <class K>
VK_DEVICE int first_step(const WgmmaArguments& h, int i) { return h.a.steps * i >> split_bits<K>(h); }

// Elements of k that lie side by side in a stage of the weight, swizzled: 128 bytes, or one step of the tensor cores
VK_BOTH bool is_wide(int step_k, int size) { return step_k * size % 128 == 0; }
VK_BOTH int span_of(int step_k, int size) { return (is_wide(step_k, size) ? 128 : 32) / size; }

#if VK_SM90A

// The token of row r of the tile that begins there, and whether there is one: otherwise it is the first of all
VK_DEVICE bool token_at(const WgmmaArguments& h, const int64_t (&origin)[3], int r, Token& token) {
    int64_t at[3];
    h.block.place(origin, r, at);
    bool there = at[0] < h.a.B && at[1] < h.grid[0] && at[2] < h.grid[1];
    token = token_of(h.a, there ? at[0] * h.a.rows + at[1] * h.grid[1] + at[2] : 0);
    return there;
}

// Of a stage that this warp has read. Blocks of a pair, 2ᵇ of them, bring what they share for both, so both must know.
VK_DEVICE void release_stage(Barrier* empty, int pair_bits) {
    sync_warp();
    if (pair_bits == 0) {
        if (lane_index() == 0) barrier_arrive(empty);
    } else if (lane_index() >> pair_bits == 0) {
        barrier_arrive(empty, lane_index());
    }
}

// The weight's part of a stage, and the word to the barrier of how much comes: `more` bytes beside it
template <class K>
VK_DEVICE void bring_weight(const WgmmaArguments& h, char* stage, Barrier* full, int d0, int step, int more) {
    constexpr int SIZE = sizeof(typename K::Value);
    int span = span_of(h.a.step_k, SIZE), bytes = K::BN * h.a.step_k * SIZE;
    barrier_expect(full, K::TERMS * bytes + more);
#pragma unroll
    for (int term = 0; term < K::TERMS; ++term) {
        char* to = stage + h.a.a_bytes + term * bytes;
        int from = (static_cast<int>(h.a.weight_row) / K::TERMS * term + step * h.a.step_k) / span;
        if (pair_bits<K>(h) == 0) {
            copy_tensor(to, &h.weight, full, 0, d0, from);
            continue;
        }
        int rows = K::BN >> h.pair_bits, row = rank_in_cluster(h.pair_bits) * rows;
        for (int i = 0; i < h.a.step_k / span; ++i)
            copy_tensor_to_all(to + (i * K::BN + row) * span * SIZE, &h.weight, full, 1 << h.pair_bits, 0, d0 + row,
                               from + i);
    }
}

template <class K>
VK_DEVICE void produce(const WgmmaArguments& h, char* stages, char* table, const Barriers& barriers) {
    using Pixel = typename K::Loader::Stored;
    constexpr bool ENGINE = K::Loader::BLOCKS;  // else RowsOf
    const ForwardArguments& a = h.a;
    bool leader = thread_index() == 0;
    if (ENGINE && !leader) return;
    if (leader) wait_for_prerequisites();  // of the weight, where it is packed
    int image_bytes = ENGINE ? K::BM * a.step_k * int(sizeof(Pixel)) : 0;
    ImageRows<Pixel> rows(a, table, K::BM, 128);
    PipelineState state;
    int part = rank_in_cluster(split_bits<K>(h));
    for (Tiles tile = tiles_of<K>(h); tile.is_there(); tile.advance()) {
        int64_t origin[3];
        if constexpr (ENGINE) {
            h.block.origin(tile.m, origin);
        } else {
            sync_some(1, 128);  // the last tile's segments are not read any more
            rows.start(int64_t{tile.m} * K::BM);
            sync_some(1, 128);
        }
        for (int step = first_step<K>(h, part); step < first_step<K>(h, part + 1); ++step) {
            barrier_wait(&barriers.empty[state.stage], state.phase ^ 1);
            Barrier* full = &barriers.full[state.stage];
            char* stage = stages + state.stage * a.stage_bytes;
            if (leader) bring_weight<K>(h, stage, full, static_cast<int>(tile.n) * K::BN, step, image_bytes);
            if constexpr (ENGINE) {
                constexpr int BOX = K::Loader::BOX;
                int group = 1 << h.block.group, rows_of_copy = group == 1 ? a.stage_rows : 1;
                for (int r = 0; r < a.stage_rows; r += rows_of_copy) {
                    int row = step * a.stage_rows + r, c = h.by_P_h.div(row), y = row - c * h.by_P_h.value;
                    for (int x = 0; x < a.layout.P_w; x += BOX)
                        for (int place = 0; place < group; ++place) {
                            int at = (x / BOX * a.stage_rows + r) * K::BM + place * (K::BM >> h.block.group);
                            copy_tensor(stage + at * BOX * int(sizeof(Pixel)), &h.image[place], full,
                                        place * a.layout.S_w + x, static_cast<int>(origin[2]) >> h.block.group,
                                        static_cast<int>(origin[1]), static_cast<int>(origin[0]), c * a.layout.H + y);
                        }
                }
            } else {
                rows.issue(stage, step);
                barrier_arrive_after_copies(full);
            }
            state.advance(a.stages);
        }
    }
}

// Rows of a stage of patch m of a tile, BYTES at a time
template <class K, int BYTES>
VK_DEVICE void copy_rows(const WgmmaArguments& h, char* stage, int step, int m, const Corner& corner, bool there) {
    using Loader = typename K::Loader;
    constexpr int SIZE = sizeof(typename Loader::Stored), EACH = BYTES / SIZE, LINE = Loader::BOX * SIZE;
    const PatchLayout& w = h.a.layout;
    bool padded = is_padded(w);
    const char* images = static_cast<const char*>(h.a.images);
#pragma unroll 1
    for (int r = 0; r < h.a.stage_rows; ++r) {
        int row = step * h.a.stage_rows + r, frame = h.by_P_h.div(row), c = h.by_P_t.div(frame);
        int t = frame - c * w.P_t, y = row - frame * w.P_h;
        bool is_row = there && row * w.P_w < w.K;
        for (int first = 0; first < w.P_w; first += Loader::BOX) {
            char* line = stage + (first / Loader::BOX * h.a.stage_rows + r) * K::BM * LINE;
            Element e{c * w.c + t * w.f + y * w.h + first, t, y, first};
#pragma unroll
            for (int x = 0; x < Loader::BOX; x += EACH, e.x += EACH, e.offset += EACH) {
                bool real = is_row && e.x < h.P_w && (!padded || is_inside(w, corner, e));
                int at = m * LINE + x * SIZE;
                copy_async<BYTES>(line + (Loader::DIRECT ? swizzled<LINE>(at) : at),
                                  images + (real ? (corner.offset + e.offset) * SIZE : 0), real ? BYTES : 0);
            }
        }
    }
}

// A thread has a patch of the tile. When it has asked for all of it, it fills its part of the table: the tile's sums are
// not there for as many steps as there are stages.
template <class K>
VK_DEVICE void produce_by_threads(const WgmmaArguments& h, char* stages, float* table, const Barriers& barriers) {
    const ForwardArguments& a = h.a;
    int m = thread_index();
    if (m == 0) wait_for_prerequisites();  // of the weight, where it is packed
    PipelineState state;
    uint32_t phase = 0;
    for (Tiles tile = tiles_of<K>(h); tile.is_there(); tile.advance(), phase ^= 1) {
        int64_t origin[3];
        h.block.origin(tile.m, origin);
        Token token;
        bool there = token_at(h, origin, m, token);
        Corner corner = corner_of(a.layout, token.b, token.n);
        for (int step = 0; step < a.steps; ++step) {
            barrier_wait(&barriers.empty[state.stage], state.phase ^ 1);
            Barrier* full = &barriers.full[state.stage];
            char* stage = stages + state.stage * a.stage_bytes;
            if (m == 0) bring_weight<K>(h, stage, full, static_cast<int>(tile.n) * K::BN, step, 0);
            a.chunk == 16 ? copy_rows<K, 16>(h, stage, step, m, corner, there)
                          : copy_rows<K, 4>(h, stage, step, m, corner, there);
            barrier_arrive_after_copies(full);
            state.advance(a.stages);
        }
        if constexpr (K::STORES) {
            barrier_wait(barriers.table_empty, phase ^ 1);
            fill_table<K::BN>(a, h.block, h.grid, origin, int64_t{tile.n} * K::BN, table, m, 128);
            barrier_arrive(barriers.table_full);
        }
    }
    if constexpr (K::STORES)
        for (int64_t at = block_index() * 128 + m; at < h.prefixes; at += block_count() * 128) write_prefix<float>(a, at);
}

inline constexpr int BESIDE = 96;  // threads: the producer's other three warps

// By them: what the tiles' sums get added, and then the prefix tokens
template <class K>
VK_DEVICE void add_beside(const WgmmaArguments& h, float* table, const Barriers& barriers) {
    const ForwardArguments& a = h.a;
    int thread = thread_index() - 32;
    uint32_t phase = 0;
    for (Tiles tile = tiles_of<K>(h); tile.is_there(); tile.advance(), phase ^= 1) {
        int64_t origin[3];
        h.block.origin(tile.m, origin);
        barrier_wait(barriers.table_empty, phase ^ 1);
        fill_table<K::BN>(a, h.block, h.grid, origin, int64_t{tile.n} * K::BN, table, thread, BESIDE);
        barrier_arrive(barriers.table_full);
    }
    for (int64_t at = block_index() * BESIDE + thread; at < h.prefixes; at += block_count() * BESIDE)
        write_prefix<float>(a, at);
}

#endif

}  // namespace vk
