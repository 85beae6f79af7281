// The epilogues of sm90.cuh: sums in the registers of a consumer's warp, 16 patches × BN channels of a tile, to tokens.
// Letters: problem.h.
//
// The general one takes all that the contract allows. In the other the copy engine takes tokens to memory, from where
// each warp lays them in shared memory, and what is added to the sums comes from a table in shared memory that threads
// without other work fill while the tile is multiplied: so dtypes, strides and the edges of grid and batch cost the
// consumers no instruction. Before that they add the positions of patches that are not those of every image's, as kept
// ones are. forward_loaders.py's no_stores says what it can't take.
#pragma once

#include "forward/sm80.cuh"

namespace vk {

// How the copy engine's tiles lie in the grid: 2ᵇ images × lines × columns, columns innermost, of patches that one
// tensor map has; outside of them the 2ᵍ neighbours that have one each.
struct TileBlock {
    int bits[3], group;
    Divisor across[2];  // tiles in x, in y

    VK_DEVICE void origin(uint32_t tile, int64_t (&at)[3]) const {  // image, line, column
        uint32_t line = across[0].div(tile), images = across[1].div(line);
        at[0] = int64_t{images} << bits[0];
        at[1] = int64_t{line - images * across[1].value} << bits[1];
        at[2] = int64_t{tile - line * across[0].value} << (bits[2] + group);
    }
    // … of row r of the tile that begins there
    VK_DEVICE void place(const int64_t (&begin)[3], int r, int64_t (&at)[3]) const {
        at[0] = begin[0] + (r >> (bits[1] + bits[2]) & ((1 << bits[0]) - 1));
        at[1] = begin[1] + (r >> bits[2] & ((1 << bits[1]) - 1));
        at[2] = begin[2] + ((r & ((1 << bits[2]) - 1)) << group) + (r >> (bits[0] + bits[1] + bits[2]));
    }
    // Positions: of one image, and of those in one map
    VK_DEVICE int positions() const { return period() << group; }
    VK_DEVICE int period() const { return 1 << (bits[1] + bits[2]); }
    VK_DEVICE int position_of(int r) const {
        return (r >> (bits[0] + bits[1] + bits[2]) << (bits[1] + bits[2])) + (r & (period() - 1));
    }
    VK_DEVICE int row_of(int position) const {  // the first row that has it
        return (position >> (bits[1] + bits[2]) << (bits[0] + bits[1] + bits[2])) + (position & (period() - 1));
    }
};

// Of images × lines × columns, `group` of which lie side by side in maps of their own, in a grid of lines and columns
inline TileBlock tile_block(const int (&block)[3], int group, const int64_t (&grid)[2]) {
    auto bits = [](int n) {
        int bits = 0;
        while (1 << bits < n) ++bits;
        return bits;
    };
    return {{bits(block[0]), bits(block[1]), bits(block[2] / group)}, bits(group),
            {Divisor(ceil_div(grid[1], block[2])), Divisor(ceil_div(grid[0], block[1]))}};
}

// Registers of a warp's sums, columns 64·part … of the tile, staged as [STAGED_ROWS, 64]
template <int N>
VK_DEVICE void put_sums(const float (&c)[N], int part, float* staged, int pitch) {
    int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < N / 32; ++i)
        if (i == part)
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    *reinterpret_cast<Two*>(staged + (g + 8 * h) * pitch + 8 * j + 2 * t) = {
                        c[32 * i + 4 * j + 2 * h], c[32 * i + 4 * j + 2 * h + 1]};
}

// row(r, token) as write_staged has it; `staged` is the warp's
template <int N, class Row>
VK_DEVICE void write_tokens(const ForwardArguments& a, const float (&c)[N], float* staged, int64_t d0, const Row& row) {
#pragma unroll 1  // write_staged is long, and would stand there for each
    for (int part = 0; part < N / 32; ++part) {
        put_sums(c, part, staged, 64 + 4);
        sync_warp();
        write_staged<64>(a, staged, 64 + 4, d0 + part * 64, row);
        sync_warp();
    }
}

// By the copy engine

inline constexpr int STORE_ROW = 64;     // bytes of a row of one store, swizzled within them
inline constexpr int STORE_BYTES = STAGED_ROWS * STORE_ROW;
inline constexpr int STORE_BUFFERS = 2;  // of a warp: one is laid out while the other is read

#if VK_SM90A

inline constexpr int TABLE_PAD = 8;  // floats, so that four rows are read without bank conflicts

// Of the table: one for each position that all images share; otherwise it is the bias alone
VK_DEVICE int table_rows(const ForwardArguments& a, const TileBlock& block) {
    return a.shared_positions ? block.positions() : 1;
}

// table[i, d] = bias[d0 + d] + pos[position i of the tile, d0 + d], by `threads` threads
template <int BN>
VK_DEVICE void fill_table(const ForwardArguments& a, const TileBlock& block, const int64_t (&grid)[2],
                          const int64_t (&origin)[3], int64_t d0, float* table, int thread, int threads) {
    constexpr int ACROSS = BN / 8;
    for (int each = thread; each < table_rows(a, block) * ACROSS; each += threads) {
        int position = each / ACROSS, column = each % ACROSS * 8;
        int64_t d = d0 + column, at[3];
        block.place(origin, block.row_of(position), at);
        float values[8] = {}, pos[8] = {};
        if (d < a.D && at[1] < grid[0] && at[2] < grid[1]) {
            if (a.bias.data)
                load_eight(values, a.bias.data, a.bias.dtype, d * a.bias.strides[0], a.bias.strides[0], 8);
            if (a.shared_positions) {
                const int64_t(&p)[5] = a.pos.strides;
                int64_t n = at[1] * grid[1] + at[2];
                load_eight(pos, a.pos.data, a.pos.dtype, (a.pos_first + n) * p[1] + d * p[2], p[2], 8);
            }
        }
        Words* to = reinterpret_cast<Words*>(table + position * (BN + TABLE_PAD) + column);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            union { Words words; float values[4]; } sums;
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.values[i] = values[4 * half + i] + pos[4 * half + i];
            to[half] = sums.words;
        }
    }
}

// The sums of a tile of which each of the 2ᵇ blocks of a cluster has multiplied a part of k: a block adds up those of its
// part of the channels, in the order of the blocks, and has them at the beginning of `c`. `memory`: that of the stages.
template <int BITS, int N>
VK_DEVICE void add_up(float (&c)[N], int rank, int warp, char* memory) {
    struct alignas(16) Four { float values[4]; };
    char* mine = memory + (warp * (N / 4) * 32 + lane_index()) * 16;
    sync_some(2, 256);  // the consumers: nobody reads the stages any more
#pragma unroll
    for (int i = 0; i < N; i += 4) *reinterpret_cast<Four*>(mine + i * 128) = {c[i], c[i + 1], c[i + 2], c[i + 3]};
    sync_cluster();
    mine += rank * (N >> BITS) * 128;
#pragma unroll
    for (int i = 0; i < N >> BITS; i += 4) {
        uint32_t parts[1 << BITS][4];
#pragma unroll
        for (int s = 0; s < 1 << BITS; ++s) read_words_of(s, mine + i * 128, parts[s]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            c[i + e] = from_bits(parts[0][e]);
#pragma unroll
            for (int s = 1; s < 1 << BITS; ++s) c[i + e] += from_bits(parts[s][e]);
        }
    }
}

// c = c·scale + pos, of row g of a warp's sums, or of row g + 8
template <class T, int N>
VK_DEVICE void add_row(float (&c)[N], int below, float scale, const T* pos) {
    struct alignas(2 * sizeof(T)) Pair { T value[2]; };
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
        Pair pair = *reinterpret_cast<const Pair*>(pos + 8 * j);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float& sum = c[4 * j + 2 * below + e];
            sum = sum * scale + to<float>(pair.value[e]);
        }
    }
}

// Of patches whose positions are their own, in the product's type or in float, all channels of whole tiles: `token` is that
// of the warp's row lane % 16, d0 the first channel. Leaves the scales of rows g and g + 8: that of a patch that is not
// there is NaN.
template <class Value, int N>
VK_DEVICE void add_positions(const ForwardArguments& a, const Token& token, int64_t d0, float (&c)[N], float (&scales)[2]) {
    const int64_t(&p)[5] = a.pos.strides;
    int64_t mine = token.real ? token.b * p[0] + (a.pos_first + token.n) * p[1] : -1;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
        int64_t row = shuffle(mine, lane_index() / 4 + 8 * below), at = row + d0 + lane_index() % 4 * 2;
        float scale = scales[below];
        if (a.pos.data) scales[below] = 1;
        if (row < 0)
            scales[below] = NAN;
        else if (a.pos.data && a.pos.dtype == Dtype::f32)
            add_row(c, below, scale, static_cast<const float*>(a.pos.data) + at);
        else if (a.pos.data)
            add_row(c, below, scale, static_cast<const Value*>(a.pos.data) + at);
    }
}

// The warp's rows are those from `row` of the tile on; `staged`: STORE_BUFFERS blocks as the map `tokens` has them.
// Out: the product's type, or float. `scales`: of rows g and g + 8. `channels`: of the 2·N
// that there are the first.
template <class Out, int N>
VK_DEVICE void store_tokens(const ForwardArguments& a, const TileBlock& block, const int64_t (&origin)[3], int64_t d0,
                            int row, const float (&c)[N], const float (&scales)[2], const float* table,
                            char* staged, const TensorMap* tokens, int channels) {
    constexpr int PITCH = 2 * N + TABLE_PAD, COLUMNS = STORE_ROW / int(sizeof(Out));  // of one store
    int lane = lane_index(), g = lane / 4, t = lane % 4;
    bool alike = !a.shared_positions || block.period() <= 8;  // rows g and g + 8, in what is added
    const float* above = table + (a.shared_positions ? block.position_of(row + g) * PITCH : 0) + 2 * t;
    const float* below = table + block.position_of(row + g + 8) * PITCH + 2 * t;
    auto at_piece = [&](char* store, int r, int piece) {  // of 16 bytes: where the swizzle has it
        return store + r * STORE_ROW + (piece ^ (r / 2 % 4)) * 16;
    };
    int64_t at[3];
    block.place(origin, row, at);
#pragma unroll
    for (int part = 0; part < 2 * N / COLUMNS; ++part) {
        if (part * COLUMNS >= channels) break;
        char* store = staged + part % STORE_BUFFERS * STORE_BYTES;
        if (lane == 0) stores_wait<STORE_BUFFERS - 1>();
        sync_warp();
#pragma unroll
        for (int two = 0; two < COLUMNS / 16; ++two) {  // times eight columns
            float tokens_of[2][4];                      // rows g and g + 8 of columns 2t and 2t + 1
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                int j = part * (COLUMNS / 8) + 2 * two + e;
                Two high = *reinterpret_cast<const Two*>(above + 8 * j), low = high;
                if (!alike) low = *reinterpret_cast<const Two*>(below + 8 * j);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    tokens_of[e][i] = c[4 * j + i] * scales[i / 2] + (i < 2 ? high : low).value[i % 2];
            }
            if constexpr (same<Out, float>) {
#pragma unroll
                for (int e = 0; e < 2; ++e)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        store_pair(at_piece(store, g + 8 * h, 2 * e + t / 2) + t % 2 * 8, tokens_of[e][2 * h],
                                   tokens_of[e][2 * h + 1]);
            } else {
                uint32_t pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    pairs[i] = pack(tokens_of[i / 2][i % 2 * 2], tokens_of[i / 2][i % 2 * 2 + 1], Out{});
                store_matrices(at_piece(store, lane % 16, 2 * two + lane / 16), pairs);
            }
        }
        fence_copy_engine();
        sync_warp();
        if (lane == 0) {
            if (d0 + part * COLUMNS < a.D)
                store_tensor(tokens, store, static_cast<int>(d0) + part * COLUMNS, static_cast<int>(at[2]) >> block.group,
                             static_cast<int>(at[1]), static_cast<int>(at[0]),
                             static_cast<int>(at[2]) & ((1 << block.group) - 1));
            stores_commit();  // an empty group, too: groups are counted
        }
    }
}

#endif

}  // namespace vk
