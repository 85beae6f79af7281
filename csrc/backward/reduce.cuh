// The sums of dY over images, the index that finds a kept patch's row, and the kernel that adds all parts in order.
//
// Bias, position and prefix come from one read of dY, in a launch of their own: it waits for memory, not for the tensor
// cores, and wants many threads of few registers, where a tile of the weight wants few of many.
//
// Included by backward.cu alone.
#pragma once

#include "backward/common.cuh"

namespace vk::backward {

struct IndexArguments {
    Tensor keep;              // [B, rows]
    int64_t N, rows;
    int32_t *heads, *nexts;   // [B, N], [B, rows]
};

inline constexpr int INDEX_THREADS = 256;

// A block has an image, and each thread the patches n ≡ its index: all read the whole list, backwards, and none writes
// what another does.
static VK_KERNEL(INDEX_THREADS, 4) index_kernel(VK_GRID_CONSTANT IndexArguments a) {
    int64_t b = block_index();
    int32_t *heads = a.heads + b * a.N, *nexts = a.nexts + b * a.rows;
    for (int64_t n = thread_index(); n < a.N; n += INDEX_THREADS) heads[n] = -1;
    constexpr int AT_ONCE = 8;
    for (int64_t stop = a.rows; stop > 0; stop -= AT_ONCE) {
        int64_t n[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int64_t i = stop - 1 - j;
            n[j] = i < 0 ? -1 : load_index(a.keep.data, a.keep.dtype, b * a.keep.strides[0] + i * a.keep.strides[1]);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            if (n[j] < 0 || n[j] >= a.N || n[j] % INDEX_THREADS != thread_index()) continue;
            int64_t i = stop - 1 - j;
            nexts[i] = heads[n[j]];
            heads[n[j]] = static_cast<int32_t>(i);
        }
    }
}

struct SumsArguments {
    Gradient grad;
    int64_t B, D, first, last, stored, table_rows, chunk, blocks, tiles_d;
    int lanes;
    void* table_parts;   // [splits, table_rows, D] of sums: token rows from `first` on; null: none wanted
    void* bias_parts;    // [splits·blocks, D] of sums; null: not wanted
    bool more;           // they are added to those that are there, of the images before
    void* copies;        // [B, rows, copy_row]: what is summed of patches, in the kernel's type of copies
    int64_t copy_row;
};

// What the sums leave a copy of: nothing; or rows of patches, in the type of wgmma's operands. `d` is a multiple of 8,
// and so are rows.
template <class To>
struct Copies {
    void* data;
    int64_t rows, row, d;

    template <class Sum>
    VK_DEVICE void operator()(int64_t b, int64_t i, const Sum (&values)[8]) const {
        if constexpr (!same<To, void>)
            if (i >= 0) put(static_cast<To*>(data) + (b * rows + i) * row + d, values);
    }
};

// How many images' rows a thread has under way
template <class Sum>
inline constexpr int AHEAD = sizeof(Sum) == 8 ? 2 : 4;

// Whole octets of rows that all begin on 16 bytes. All are loaded before the first is converted: a conversion waits for
// its load, and what stands between two branches is not moved past them, so that load_eight, which branches, would have
// one row under way.
template <class From>
VK_DEVICE bool are_aligned(const From* row, const Gradient& g, int count) {
    return g.d == 1 && count == 8 && is_aligned(row) && g.b * int(sizeof(From)) % 16 == 0;
}

template <class From>
using Octet = Side<From, 8>;

template <class From>
VK_DEVICE Octet<From> octet_at(const From* row) { return *reinterpret_cast<const Octet<From>*>(row); }

template <class From, class Sum, class To>
VK_DEVICE void add(Sum (&total)[8], const Octet<From>& octet, int64_t b, int64_t i, const Copies<To>& copy) {
    Sum values[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = to<Sum>(octet.values[j]);
    add(total, values);
    copy(b, i, values);
}

// Fewer where they are copied, for registers.
template <class From, class Sum, class To>
inline constexpr int OCTETS_AHEAD = sizeof(From) == 2 && same<To, void> ? 2 * AHEAD<Sum> : AHEAD<Sum>;

template <class From, class Sum, class To>
VK_DEVICE void add_aligned_rows(Sum (&total)[8], const From* row, int64_t step, int64_t count, int64_t b1, int64_t i,
                                const Copies<To>& copy) {
    constexpr int ROWS = OCTETS_AHEAD<From, Sum, To>;
    for (; count >= ROWS; count -= ROWS) {
        Octet<From> octets[ROWS];
#pragma unroll
        for (int j = 0; j < ROWS; ++j, row += step) octets[j] = octet_at(row);
#pragma unroll
        for (int j = 0; j < ROWS; ++j) add(total, octets[j], b1 - count + j, i, copy);
    }
    for (; count > 0; --count, row += step) add(total, octet_at(row), b1 - count, i, copy);
}

// Σ_b dY[b, r, d … d + 7] for images b0 ≤ b < b1, in order
template <class From, class Sum, class To>
VK_DEVICE void add_rows(Sum (&total)[8], const Gradient& g, int64_t b0, int64_t b1, int64_t r, int64_t d, int count,
                        const Copies<To>& copy) {
    const From* row = static_cast<const From*>(g.data) + r * g.n + d * g.d + b0 * g.b;
    if (are_aligned(row, g, count)) return add_aligned_rows(total, row, g.b, b1 - b0, b1, r - g.T, copy);
    for (int64_t b = b0; b < b1; ++b, row += g.b) {
        Sum values[8];
        clear(values);
        load_eight(values, row, g.d, count);
        add(total, values);
        copy(b, r - g.T, values);
    }
}

// The same of the rows that keep patch n
template <class From, class Sum, class To>
VK_DEVICE void add_kept(Sum (&total)[8], const Gradient& g, int64_t b0, int64_t b1, int64_t n, int64_t d, int count,
                        const Copies<To>& copy) {
    const From* row = static_cast<const From*>(g.data) + g.T * g.n + d * g.d;
    bool aligned = are_aligned(row, g, count) && g.n * int(sizeof(From)) % 16 == 0;
    constexpr int ROWS = OCTETS_AHEAD<From, Sum, To>;
    for (int64_t b = b0; b < b1; b += ROWS) {
        int32_t at[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) at[i] = b + i < b1 ? g.heads[(b + i) * g.N + n] : -1;
        if (aligned) {
            Octet<From> octets[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
                octets[i] = at[i] >= 0 ? octet_at(row + (b + i) * g.b + at[i] * g.n) : Octet<From>{};
#pragma unroll
            for (int i = 0; i < ROWS; ++i) add(total, octets[i], b + i, at[i], copy);
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
                if (at[i] >= 0) at[i] = g.nexts[(b + i) * g.rows + at[i]];
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            for (; at[i] >= 0; at[i] = g.nexts[(b + i) * g.rows + at[i]]) {  // kept more than once, or not aligned
                Sum values[8];
                clear(values);
                load_eight(values, row + (b + i) * g.b + at[i] * g.n, g.d, count);
                add(total, values);
                copy(b + i, at[i], values);
            }
    }
}

template <class From, class Sum, class To>
VK_DEVICE void add_tokens(Sum (&total)[8], const Gradient& g, int64_t b0, int64_t b1, int64_t r, int64_t d, int count,
                          const Copies<To>& copy) {
    if (g.heads && r >= g.T)
        add_kept<From>(total, g, b0, b1, r - g.T, d, count, copy);
    else
        add_rows<From>(total, g, b0, b1, r, d, count, copy);
}
template <class Sum, class To>
VK_DEVICE void add_tokens(Sum (&total)[8], const Gradient& g, Dtype dtype, int64_t b0, int64_t b1, int64_t r, int64_t d,
                          int count, const Copies<To>& copy) {
    switch (dtype) {
        case Dtype::f16: return add_tokens<half>(total, g, b0, b1, r, d, count, copy);
        case Dtype::bf16: return add_tokens<bfloat16>(total, g, b0, b1, r, d, count, copy);
        case Dtype::f32: return add_tokens<float>(total, g, b0, b1, r, d, count, copy);
        default: return add_tokens<double>(total, g, b0, b1, r, d, count, copy);
    }
}

// A block has SUMS_THREADS / lanes token rows × lanes·8 channels, over one part of the images. To: of the copies; void:
// there are none.
template <class Sum, class To = void>
VK_KERNEL(SUMS_THREADS, 2) sums_kernel(VK_GRID_CONSTANT SumsArguments a) {
    int64_t tiles = a.blocks * a.tiles_d, split = block_index() / tiles, tile = block_index() - split * tiles;
    int64_t block = tile / a.tiles_d, d0 = (tile - block * a.tiles_d) * a.lanes * 8;
    int height = SUMS_THREADS / a.lanes, row = thread_index() / a.lanes, lane = thread_index() - row * a.lanes;
    int64_t r = a.first + block * height + row, d = d0 + lane * 8;
    int64_t b0 = split * a.chunk, b1 = least(b0 + a.chunk, a.B);
    int count = r < a.last ? clamp_eight(a.D - d) : 0;
    Sum total[8];
    clear(total);
    Copies<To> copy{a.copies, a.grad.rows, a.copy_row, d};
    if (count > 0) add_tokens(total, a.grad, a.grad.dtype, b0, b1, r, d, count, copy);
    if (a.table_parts && count > 0 && r < a.stored) {
        Sum *part = static_cast<Sum*>(a.table_parts) + (split * a.table_rows + r - a.first) * a.D + d, sums[8];
        clear(sums);
        if (a.more) load_eight(sums, part, 1, count);
        add(sums, total);
        store_eight(part, sums, count);
    }
    if (!a.bias_parts) return;
    Sum* rows = reinterpret_cast<Sum*>(shared_memory());  // [height, lanes·8]
#pragma unroll
    for (int j = 0; j < 8; ++j) rows[thread_index() * 8 + j] = r >= a.grad.T ? total[j] : 0;
    sync_block();
    for (int i = thread_index(); i < a.lanes * 8; i += SUMS_THREADS) {
        Sum sum = 0;
        for (int j = 0; j < height; ++j) sum += rows[j * a.lanes * 8 + i];
        if (d0 + i >= a.D) continue;
        Sum& part = static_cast<Sum*>(a.bias_parts)[(split * a.blocks + block) * a.D + d0 + i];
        part = a.more ? part + sum : sum;
    }
}

struct FinishArguments {
    PatchLayout layout;
    const void *weight_parts, *table_parts, *bias_parts;  // [parts, size] of sums
    int64_t weight_count, table_count, bias_count;        // parts
    int64_t weight_size, table_size, D, K;                // elements of a part
    int64_t table_blocks, bias_blocks;                    // the first of the blocks; the others are dW's
    int64_t pos_from, prefix_stop;                        // rows of the table
    double scale;                                         // of dW
    Tensor d_weight, d_bias, d_pos, d_prefix;             // as BackwardTensors has them
};

inline constexpr int FINISH_THREADS = 256, FINISH_CHANNELS = 32;

// parts[at] + parts[at + size·step] + …: all that are `step` apart, in order
template <class Sum>
VK_DEVICE Sum add_parts(const void* parts, int64_t size, int64_t at, int64_t from, int64_t count, int step) {
    constexpr int AT_ONCE = 8;
    const Sum* part = static_cast<const Sum*>(parts) + at;
    Sum total = 0;
    for (int64_t s = from; s < count; s += AT_ONCE * step) {
        Sum values[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) values[i] = s + i * step < count ? part[(s + i * step) * size] : 0;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) total += values[i];
    }
    return total;
}

template <class Sum>
VK_DEVICE void finish_weight(const FinishArguments& a, int64_t at) {
    if (at >= a.weight_size) return;
    Sum total = add_parts<Sum>(a.weight_parts, a.weight_size, at, 0, a.weight_count, 1) * static_cast<Sum>(a.scale);
    int64_t d = at / a.K;
    int k = static_cast<int>(at - d * a.K);
    store(a.d_weight.data, a.d_weight.dtype,
          d * a.d_weight.strides[0] + weight_offset(a.layout, k, a.d_weight.strides), total);
}

template <class Sum>
VK_DEVICE void finish_table(const FinishArguments& a, int64_t at) {
    if (at >= a.table_size) return;
    Sum total = add_parts<Sum>(a.table_parts, a.table_size, at, 0, a.table_count, 1);
    int64_t r = at / a.D, d = at - r * a.D;
    if (a.d_pos.data && r >= a.pos_from)
        store(a.d_pos.data, a.d_pos.dtype, (r - a.pos_from) * a.d_pos.strides[1] + d * a.d_pos.strides[2], total);
    if (a.d_prefix.data && r < a.prefix_stop)
        store(a.d_prefix.data, a.d_prefix.dtype, r * a.d_prefix.strides[1] + d * a.d_prefix.strides[2], total);
}

// Many parts of few channels: several threads to a channel, and their sums in order.
template <class Sum>
VK_DEVICE void finish_bias(const FinishArguments& a, int64_t block) {
    constexpr int GROUPS = FINISH_THREADS / FINISH_CHANNELS;
    int group = thread_index() / FINISH_CHANNELS, channel = thread_index() % FINISH_CHANNELS;
    int64_t d = block * FINISH_CHANNELS + channel;
    Sum* sums = reinterpret_cast<Sum*>(shared_memory());  // [GROUPS, FINISH_CHANNELS]
    sums[thread_index()] = d < a.D ? add_parts<Sum>(a.bias_parts, a.D, d, group, a.bias_count, GROUPS) : 0;
    sync_block();
    if (group > 0 || d >= a.D) return;
    Sum total = 0;
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) total += sums[i * FINISH_CHANNELS + channel];
    store(a.d_bias.data, a.d_bias.dtype, d * a.d_bias.strides[0], total);
}

template <class Sum>
VK_KERNEL(FINISH_THREADS, 4) finish_kernel(VK_GRID_CONSTANT FinishArguments a) {
    int64_t block = block_index(), of_weight = block - a.table_blocks - a.bias_blocks;
    if (block < a.table_blocks) {
        finish_table<Sum>(a, block * FINISH_THREADS + thread_index());
    } else if (of_weight < 0) {
        finish_bias<Sum>(a, block - a.table_blocks);
    } else {
        wait_for_prerequisites();  // of dW's parts: the sums were there before these were begun
        finish_weight<Sum>(a, of_weight * FINISH_THREADS + thread_index());
    }
}

}  // namespace vk::backward
