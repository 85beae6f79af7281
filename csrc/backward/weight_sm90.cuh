// The gradient of the weight on sm_90a: parts of dW[d, k] = Σ_m dY[m, d]·x[m, k] by the copy engine and wgmma, where
// weight_sm80.cuh has any problem and every machine. Letters: problem.h.
//
// wgmma's rows are elements of a patch, its columns channels. A block of three warpgroups stays on its multiprocessor
// and takes one tile of one split after the other: 8 rows × 16 pixels of a channel of the patches (128 elements), by
// BN channels of dY. One thread of the first warpgroup brings 64 patches at a time, images × lines × columns of the
// grid, of the pixels and of dY; what hangs over the grid's edge is zeros in both. The other warpgroups multiply 64
// elements × BN channels each, a warp having one of the rows of pixels.
//
// A tensor map has patches that begin on 16 bytes. Those of 14 pixels of 16 bits are 28 bytes apart, and one of 4 does:
// the copy engine brings a group of 4 by 4 maps, each of which ends with its patch, so that the two pixels past it
// arrive as zeros. Then the patches of a step are ordered by their place in the group first, in dY as well.
//
// Patches that no tensor map describes (kept ones, of a video, of a padded image, of rows of any length) are copied by the
// four warps of the first warpgroup, BY_THREADS: there the grid's lines are those of all frames, or the patches that an
// image keeps are a line.
//
// dY lies in shared memory as wgmma reads an operand with the patch outermost. So do pixels that are the operands
// themselves; others are put together in registers, where row g is pixel 2g and row g + 8 the next: pixels are read two
// at a time.
#pragma once

#include "backward/weight_producers_sm90.cuh"

namespace vk::backward {

#if VK_SM90A

// 16 pixels × 16 patches as wgmma takes A from registers. A lane reads pixels 2g and 2g + 1 of its four patches. Those
// of the copy engine's swizzle lie so that all lanes' bytes of one load are in different banks if half of the lanes
// begin with the odd one of two patches; they rotate their results.
template <class K>
struct Elements16 {
    using Pixel = typename K::Pixel;
    static constexpr int SIZE = sizeof(Pixel), LINE = K::LINE;
    int one, other;  // bytes from the first patch: the patch that is read first, and its neighbour
    int rotation;    // bits
    int next;        // bytes from a patch to the eighth after it
    float m[2], a[2];

    VK_DEVICE Elements16(const WgmmaWeightArguments& h, int k) {  // from element k on
        int g = lane_index() / 4, t = lane_index() % 4;
        bool odd = SIZE == 2 ? t >= 2 : SIZE == 4 && t % 2 == 1;
        // Of the swizzle: the 128 bytes that patches 2t and 2t + 1 are in, modulo the pattern
        int piece = SIZE == 1 ? 0 : (g * 2 * SIZE / 16) ^ (SIZE == 2 ? t / 2 : t);
        one = (2 * t + odd) * LINE + piece * 16 + g * 2 * SIZE % 16;
        other = one + (odd ? -LINE : LINE);
        rotation = odd ? 16 : 0;
        next = h.copied > 8 ? 8 * LINE : WGMMA_ROWS * 8 * LINE;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            m[i] = 0, a[i] = 1;
            if (h.centred) {
                int element = k + 2 * g + i;  // one past the patch is multiplied, and not written
                int c = channel_of(h.layout, element < h.layout.K ? element : h.layout.K - 1);
                m[i] = read_once(h.centred + c), a[i] = read_once(h.centred + h.C + c);
            }
        }
    }

    template <bool NORMALISED>
    VK_DEVICE void put_together(uint32_t (&r)[4], const char* from) const {
        struct alignas(2 * SIZE) Pair { Pixel x[2]; };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Pair first = *reinterpret_cast<const Pair*>(from + one + half * next);
            Pair second = *reinterpret_cast<const Pair*>(from + other + half * next);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float low = to_float(first.x[i]), high = to_float(second.x[i]);
                if (NORMALISED) low = (low - m[i]) * a[i], high = (high - m[i]) * a[i];
                uint32_t pair = pack(low, high, typename K::T{});
                if (SIZE > 1) pair = static_cast<uint32_t>((uint64_t{pair} << 32 | pair) >> rotation);
                r[2 * half + i] = pair;
            }
        }
    }
    VK_DEVICE void operator()(uint32_t (&r)[4], const char* from, bool normalised) const {
        if (normalised)
            put_together<true>(r, from);
        else
            put_together<false>(r, from);
    }
};

// Sums to the part: those of one row of pixels and BN channels
template <class K>
VK_DEVICE void write_part(const WgmmaWeightArguments& h, const WorkTile& work, int k, const float (&c)[K::BN / 2]) {
    int g = lane_index() / 4, t = lane_index() % 4, d0 = work.d0 * K::BN + 2 * t, pixels = h.layout.P_w - work.x;
    bool first = (K::DIRECT ? g : 2 * g) < pixels, second = g + 8 < pixels, more = h.more;
    float* part = h.parts + (work.split * h.D + d0) * h.K + k;
#pragma unroll
    for (int j = 0; j < K::BN / 8; ++j, part += 8 * h.K)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (d0 + 8 * j + e >= h.D) continue;
            float* to = part + e * h.K;
            if constexpr (K::DIRECT) {
                if (first) to[g] = c[4 * j + e] + (more ? to[g] : 0);
                if (second) to[g + 8] = c[4 * j + 2 + e] + (more ? to[g + 8] : 0);
            } else if (first) {
                Two* two = reinterpret_cast<Two*>(to + 2 * g);
                Two before = more ? *two : Two{};
                *two = {c[4 * j + e] + before.value[0], c[4 * j + 2 + e] + before.value[1]};
            }
        }
}

template <class K>
VK_DEVICE void consume(const WgmmaWeightArguments& h, const char* stages, Barrier* full, Barrier* empty) {
    using T = typename K::T;
    int warp = warp_index() - 4, row_bytes = h.copied * K::LINE;
    auto patches = [&](int m) {  // from patch m of a step on: bytes from the first
        return (m & -h.copied) * WGMMA_ROWS * K::LINE + (m & (h.copied - 1)) * K::LINE;
    };
    PipelineState state;
    for (int64_t i = block_index() >> h.pair_bits; i < h.work_tiles; i += block_count() >> h.pair_bits) {
        WorkTile work = work_tile(h, static_cast<uint32_t>(i));
        int row = work.y + warp, k = (work.c * h.layout.P_h + row) * h.layout.P_w + work.x;
        float c[K::BN / 2];
#pragma unroll
        for (int j = 0; j < K::BN / 2; ++j) c[j] = 0;
        auto release = [&](int slot) { release_stage(&empty[slot], h.pair_bits); };
        int before = -1;          // the stage that the products under way may still read
        uint32_t operands[2][4];  // two, as one is being read by the tensor cores
        auto elements = [&] {
            if constexpr (K::DIRECT) return 0;
            else return Elements16<K>(h, k);
        }();
        for (int n = work.first; n < work.stop; ++n) {
            barrier_wait(&full[state.stage], state.phase);
            if constexpr (K::BY_THREADS) fence_copy_engine();  // wgmma reads as that does what threads have written
            const char* stage = stages + state.stage * K::STAGE;
            uint32_t pixels = shared_address(stage), grads = pixels + K::PIXELS;
            auto grad = [&](int m) {  // 16 patches of all BN channels
                return matrix_descriptor_across<128>(grads + m * 128, K::CHANNELS);
            };
            if constexpr (K::DIRECT) {
                warpgroup_fence();
#pragma unroll
                for (int m = 0; m < WGMMA_STEP; m += 16) {
                    uint32_t rows = pixels + warp / 4 * 4 * row_bytes + patches(m);
                    warpgroup_multiply_add<true>(c, matrix_descriptor_across<32>(rows, row_bytes), grad(m), T{});
                }
                warpgroup_commit();
                warpgroup_wait<1>();  // the stage before has been read
                if (before >= 0) release(before);
            } else {
#pragma unroll
                for (int m = 0; m < WGMMA_STEP; m += 16) {
                    elements(operands[m / 16 % 2], stage + warp * row_bytes + patches(m), h.centred != nullptr);
                    warpgroup_fence();
                    warpgroup_multiply_add<true>(c, operands[m / 16 % 2], grad(m), T{});
                    warpgroup_commit();
                    warpgroup_wait<1>();
                    if (m == 0 && before >= 0) release(before);
                }
            }
            before = state.stage;
            state.advance(h.stages);
        }
        warpgroup_wait<0>();
        release(before);  // no split is without patches
        if (row >= work.from) write_part<K>(h, work, k, c);
    }
}

#endif

template <class K>
VK_KERNEL(K::THREADS, 1) wgmma_weight_kernel(VK_GRID_CONSTANT WgmmaWeightArguments h) {
#if VK_SM90A
    launch_dependents();  // backward.cu's finish_kernel, which waits for the parts
    char* stages = shared_memory();  // aligned to 1024 bytes, as the swizzles are
    Barrier *full = reinterpret_cast<Barrier*>(stages + h.stages * K::STAGE), *empty = full + h.stages;
    if (thread_index() == 0) {
        for (int place = 0; !K::BY_THREADS && place < 1 << h.block.group; ++place) prefetch_map(&h.image[place]);
        prefetch_map(&h.grad);
        for (int i = 0; i < h.stages; ++i) {
            barrier_init(&full[i], K::BY_THREADS ? 129 : 1);  // the announcement of bytes, the threads' copies
            barrier_init(&empty[i], 8 << h.pair_bits);        // the warps that multiply
        }
        barrier_init_done();
    }
    sync_block();
    if (h.pair_bits) sync_cluster();  // as in forward/sm90.cuh
    if (thread_index() < 128) {
        fewer_registers<K::PRODUCER_REGISTERS>();
        if constexpr (K::BY_THREADS)
            produce_by_threads<K>(h, stages, full, empty);
        else if (thread_index() == 0)
            produce<K>(h, stages, full, empty);
    } else {
        more_registers<K::CONSUMER_REGISTERS>();
        consume<K>(h, stages, full, empty);
    }
    if (h.pair_bits) sync_cluster();
#else
    stop_with_error();  // it is planned for sm_90 alone, and only where there is code of sm_90a
#endif
}

// [group, B, lines, columns / group, D], dY of the patches
inline TensorBlock grad_block(const Problem& p, const Tensor& grad, const int (&block)[3], int group,
                              const int64_t (&grid)[2]) {
    uint64_t row = static_cast<uint64_t>(grad.strides[1]) * 2, line = row * static_cast<uint64_t>(grid[1]);
    uint64_t image = p.B > 1 ? static_cast<uint64_t>(grad.strides[0]) * 2 : line;
    return {grad.dtype, 5,
            {uint64_t(p.D), uint64_t(grid[1] / group), uint64_t(grid[0]), uint64_t(p.B), uint64_t(group)},
            {2, row * uint64_t(group), line, image, row},
            {64, uint32_t(block[2] / group), uint32_t(block[1]), uint32_t(block[0]), uint32_t(group)},
            128};
}

template <class K>
void launch_wgmma_weight(const WgmmaWeightLaunch& l) {
    const Problem& p = l.p;
    const WeightPlan& plan = l.plan;
    WgmmaWeightArguments h{};
    h.layout = layout_of(p, p.strides);
    constexpr int size = sizeof(typename K::Pixel), swizzle = size > 1 ? WGMMA_PIXELS * size : 0;
    for (int place = 0; !K::BY_THREADS && place < plan.group; ++place)
        h.image[place] = make_tensor_map(
            image_block(p, h.layout, plan.block, WGMMA_ROWS, WGMMA_PIXELS, swizzle, plan.group, place), l.images.data);
    h.grid[0] = lines_of(p), h.grid[1] = columns_of(p);
    const char* patches = static_cast<const char*>(l.grad.data) + l.T * l.grad.strides[1] * 2;
    h.grad = make_tensor_map(grad_block(p, l.grad, plan.block, plan.group, h.grid), patches);
    h.centred = l.centred, h.parts = l.parts, h.more = l.more;
    h.D = p.D, h.K = p.K, h.C = p.C, h.copied = WGMMA_STEP / plan.group;
    h.images = l.images, h.grads = l.grad, h.B = p.B, h.T = l.T, h.N = p.N, h.bytes = plan.pixels.chunk;
    if (p.keep) h.keep = l.keep;
    h.by_P_t = Divisor(p.P[0]);
    h.block = tile_block(plan.block, plan.group, h.grid);
    h.steps = ceil_div(p.B, plan.block[0]) * h.block.across[1].value * h.block.across[0].value;
    h.chunk = plan.chunk / WGMMA_STEP;
    h.work_tiles = plan.splits * plan.tiles / plan.pair, h.pair_bits = plan.pair - 1;
    h.by_tiles = Divisor(plan.tiles / plan.pair), h.by_tiles_d = Divisor(plan.tiles / plan.tiles_k);
    h.by_across = Divisor(ceil_div(h.layout.P_w, WGMMA_PIXELS)), h.by_down = Divisor(ceil_div(p.P[1], WGMMA_ROWS));
    h.stages = plan.stages;
    launch(wgmma_weight_kernel<K>, plan.blocks, K::THREADS, plan.shared_bytes, l.stream, h,
           "the gradient of the weight", plan.pair);
}

template <class T, class Pixel, bool DIRECT>
void launch_weight_tile(const WgmmaWeightLaunch& l) {
    bool by_threads = l.plan.pixels.chunk > 0;
    if (by_threads && l.plan.tile.BM == 256)
        return launch_wgmma_weight<WgmmaWeightKernel<T, Pixel, DIRECT, 256, true>>(l);
    if (!by_threads && l.plan.tile.BM == 256)
        return launch_wgmma_weight<WgmmaWeightKernel<T, Pixel, DIRECT, 256, false>>(l);
    if (!by_threads && l.plan.tile.BM == 128)
        return launch_wgmma_weight<WgmmaWeightKernel<T, Pixel, DIRECT, 128, false>>(l);
    no_kernel(l.plan.tile.BM, l.plan.tile.BN);
}

template <class T>
void launch_weight_sm90(const WgmmaWeightLaunch& l) {
    if (l.p.image == Dtype::u8) return launch_weight_tile<T, uint8_t, false>(l);
    if (l.p.image == Dtype::f32) return launch_weight_tile<T, float, false>(l);
    l.centred ? launch_weight_tile<T, T, false>(l) : launch_weight_tile<T, T, true>(l);
}

}  // namespace vk::backward
