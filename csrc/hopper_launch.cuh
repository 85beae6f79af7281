// The road of sm_90a, launched: tensor maps of image and weight, and which kernels there are.
#pragma once

#include "forward_roads.h"
#include "hopper.cuh"
#include "tensor_map.h"

namespace vk {

// [C·H, B, G_h, G_w, P_w], a channels-last image being one channel; the innermost first
inline TensorBlock image_block(const Problem& p, const Forward& f, const Walk& w, int box, bool direct) {
    uint64_t size = size_of(p.image), rows = (w.channels_last ? 1 : p.C) * p.H;
    auto bytes = [&](int64_t elements) { return static_cast<uint64_t>(elements) * size; };
    // One image, line or row has no next: any stride that the driver takes.
    uint64_t line = bytes(w.S_h * w.h), image = p.B > 1 ? bytes(w.b) : line;
    return {p.image, 5,
            {uint64_t(w.P_w), uint64_t(p.G[2]), uint64_t(p.G[1]), uint64_t(p.B), rows},
            {size, bytes(w.S_w), line, image, bytes(w.h)},
            {uint32_t(box), uint32_t(f.block[2]), uint32_t(f.block[1]), uint32_t(f.block[0]), uint32_t(f.stage_rows)},
            direct ? 32 : 0};
}

// [K / span, D, span]
inline TensorBlock weight_block(const Problem& p, const Forward& f) {
    uint64_t size = size_of(p.compute), span = f.step_k % 64 == 0 ? 64 : 16;
    return {p.compute, 3,
            {span, uint64_t(p.D), uint64_t(ceil_div(p.K, int64_t(span)))},
            {size, uint64_t(f.weight_row) * size, span * size},
            {uint32_t(span), uint32_t(f.tile.BN), uint32_t(f.step_k / span)},
            static_cast<int>(span * size)};
}

template <class T, class Source, int BN>
void launch_hopper(const ForwardLaunch& l) {
    using K = HopperKernel<T, Source, BN>;
    const Problem& p = l.p;
    HopperArguments h{};
    h.a = l.arguments;
    h.weight = make_tensor_map(weight_block(p, l.plan), l.arguments.weight);
    if constexpr (Source::ENGINE) {
        h.image = make_tensor_map(image_block(p, l.plan, l.arguments.walk, Source::BOX, Source::DIRECT), l.arguments.images);
        for (int i = 0; i < 3; ++i)
            while (1 << h.block_bits[i] < l.plan.block[i]) ++h.block_bits[i];
        h.by_blocks[0] = Divisor(ceil_div(p.G[2], l.plan.block[2]));
        h.by_blocks[1] = Divisor(ceil_div(p.G[1], l.plan.block[1]));
        h.by_P_h = Divisor(p.P[1]);
    }
    h.prefixes = l.prefixes;
    launch(hopper_kernel<K>, l.plan.blocks, K::THREADS, l.plan.shared_bytes, l.stream, h, "the forward");
}

template <class T, class Source>
void launch_tile(const ForwardLaunch& l) {
    l.plan.tile.BN == 256 ? launch_hopper<T, Source, 256>(l) : launch_hopper<T, Source, 128>(l);
}

template <class T>
void launch_hopper_road(const ForwardLaunch& l) {
    bool patches = l.plan.road == Road::patches;
    if (l.p.image == Dtype::u8)
        return patches ? launch_tile<T, PatchesOf<uint8_t, false>>(l) : launch_tile<T, RowsOf<uint8_t>>(l);
    if (l.p.image == Dtype::f32)
        return patches ? launch_tile<T, PatchesOf<float, false>>(l) : launch_tile<T, RowsOf<float>>(l);
    if (!patches) return launch_tile<T, RowsOf<T>>(l);
    return l.arguments.centred ? launch_tile<T, PatchesOf<T, false>>(l) : launch_tile<T, PatchesOf<T, true>>(l);
}

}  // namespace vk
