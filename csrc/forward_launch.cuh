// From a plan to an instantiated kernel: the tables of which kernels there are.
#pragma once

#include "forward.cuh"
#include "forward_roads.h"

namespace vk {

template <class K>
void launch_forward(const ForwardLaunch& l) {
    launch(forward_kernel<K>, l.plan.blocks + ceil_div(l.prefixes, K::THREADS), K::THREADS, l.plan.shared_bytes,
           l.stream, l.arguments, "the forward");
}

// On tensor cores: the tiles are plan.h's MMA_TILES.
template <class T, class Source>
void launch_tile(const ForwardLaunch& l) {
    if (l.plan.tile.BM == 128)
        launch_forward<ForwardKernel<T, Source, 128, 128, 64, 32>>(l);
    else
        launch_forward<ForwardKernel<T, Source, 32, 64, 16, 32>>(l);
}

template <class Pixel>
using CopyPixels = Copy<Pixel, false>;

template <class T, template <class> class Source>
void launch_pixels(const ForwardLaunch& l) {
    using Value = typename Kind<T>::Value;
    if (l.p.image == Dtype::u8)
        launch_tile<T, Source<uint8_t>>(l);
    else if (l.p.image == l.p.compute)
        launch_tile<T, Source<Value>>(l);
    else if constexpr (!same<Value, float>)
        launch_tile<T, Source<float>>(l);
}

template <class T>
void launch_road(const ForwardLaunch& l) {
    switch (l.plan.road) {
        case Road::copy:
            if constexpr (Kind<T>::K_STEP == 16)
                if (l.p.image == l.p.compute && !l.arguments.centred) return launch_tile<T, Copy<T, true>>(l);
            return launch_pixels<T, CopyPixels>(l);
        case Road::rows: return launch_pixels<T, ImageRows>(l);
        default: return launch_forward<ForwardKernel<T, Gather<T>, 32, 64, 16, 32>>(l);
    }
}

// Without tensor cores: plan.h's PLAIN_TILES
template <class T>
void launch_plain(const ForwardLaunch& l) {
    if constexpr (same<T, float>)
        if (l.plan.road == Road::copy) {
            if (l.p.image == Dtype::u8) return launch_forward<ForwardKernel<T, Copy<uint8_t, false>, 64, 64, 32, 32>>(l);
            return launch_forward<ForwardKernel<T, Copy<float, false>, 64, 64, 32, 32>>(l);
        }
    launch_forward<ForwardKernel<T, Gather<T>, 64, 64, 32, 32>>(l);
}

}  // namespace vk
