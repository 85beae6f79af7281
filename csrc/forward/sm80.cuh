// The forward by warps: tokens = patches·Wᵀ + bias + position, a block making BM patches × BN channels of them.
// For sm_80 and later; sm90.cuh is for sm_90a. Letters: problem.h.
//
// A ring of stages in shared memory is filled by asynchronous copies, `step_k` of k at a time, while earlier stages are
// multiplied. What a stage holds of the patches is the loader's affair (gather, copy, rows); operands are put together,
// converted and normalised as they are read from it (loaders.cuh).
#pragma once

#include <cmath>

#include "common/errors.h"
#include "common/launch.h"
#include "forward/loaders.cuh"

namespace vk {

// The epilogue: sums staged in shared memory, [STAGED_ROWS, COLUMNS], to tokens, each row by neighbouring lanes, eight channels a lane:
//   out[b, T+i, d …] = sums·scale + bias[d …] + pos[b, first + n, d …]
// row(r, token) says which token row r is, and whether it is one. What is added is loaded for all rows before the first
// token is written: a load can't be moved before a store that might be to the same place.
template <int COLUMNS, class Sum, class Row>
VK_DEVICE void write_staged(const ForwardArguments& a, const Sum* staged, int pitch, int64_t d0, const Row& row) {
    constexpr int ACROSS = COLUMNS / 8, ROWS = STAGED_ROWS * ACROSS / 32;
    int c = lane_index() % ACROSS * 8, first = lane_index() / ACROSS;
    int64_t d = d0 + c;
    int count = static_cast<int>(a.D - d < 8 ? a.D - d : 8);
    if (count <= 0) return;
    Sum bias[8] = {}, extra[ROWS][8];
    if (a.bias.data)
        load_eight(bias, a.bias.data, a.bias.dtype, d * a.bias.strides[0], a.bias.strides[0], count);
    Token tokens[ROWS];
    bool there[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        there[i] = row(first + i * (32 / ACROSS), tokens[i]);
        Sum pos[8] = {};
        if (there[i] && a.pos.data) {
            const int64_t(&p)[5] = a.pos.strides;
            int64_t at = tokens[i].b * p[0] + (a.pos_first + tokens[i].n) * p[1] + d * p[2];
            load_eight(pos, a.pos.data, a.pos.dtype, at, p[2], count);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) extra[i][e] = bias[e] + pos[e];
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (!there[i]) continue;
        union { Words words[sizeof(Sum) / 2]; Sum values[8]; } sums;
#pragma unroll
        for (int w = 0; w < int(sizeof(Sum)) / 2; ++w)
            sums.words[w] = reinterpret_cast<const Words*>(staged + (first + i * (32 / ACROSS)) * pitch + c)[w];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            sums.values[e] = sums.values[e] * static_cast<Sum>(a.scale) + extra[i][e];
            if (!tokens[i].real) sums.values[e] = static_cast<Sum>(NAN);
        }
        int64_t at = (tokens[i].b * (a.T + a.rows) + a.T + tokens[i].i) * a.D + d;
        store_eight(a.out.data, a.out.dtype, at, sums.values, count);
    }
}

// out[b, t] = prefix[b, t] (+ pos[b, t]), eight channels a thread; `at` counts the threads of all prefix tokens
template <class Sum>
VK_DEVICE void write_prefix(const ForwardArguments& a, int64_t at) {
    int64_t across = ceil_div(a.D, 8), row = at / across, d = (at - row * across) * 8;
    int64_t b = row / a.T, t = row - b * a.T;
    if (b >= a.B) return;
    int count = static_cast<int>(a.D - d < 8 ? a.D - d : 8);
    Sum values[8] = {}, extra[8] = {};
    const int64_t(&p)[5] = a.prefix.strides;
    load_eight(values, a.prefix.data, a.prefix.dtype, b * p[0] + t * p[1] + d * p[2], p[2], count);
    if (a.pos.data && a.pos_first > 0) {
        const int64_t(&q)[5] = a.pos.strides;
        load_eight(extra, a.pos.data, a.pos.dtype, b * q[0] + t * q[1] + d * q[2], q[2], count);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] += extra[i];
    }
    store_eight(a.out.data, a.out.dtype, (b * (a.T + a.rows) + t) * a.D + d, values, count);
}

// The kernel

// The weight's rows d0 …, k0 …, `weight_chunk` bytes at a time: [BN][b_pitch]
template <class Value>
VK_DEVICE void copy_weight(const ForwardArguments& a, char* stage, int64_t d0, int step, int BN, int threads) {
    int each = a.weight_chunk / static_cast<int>(sizeof(Value)), across = a.by_weight_chunks.value;
    int k0 = step * a.step_k;
    for (int at = thread_index(); at < BN * across; at += threads) {
        int n = a.by_weight_chunks.div(at), k = (at - n * across) * each;
        bool real = d0 + n < a.D && k0 + k < a.layout.K;
        const Value* from = static_cast<const Value*>(a.weight) + (real ? (d0 + n) * a.weight_row + k0 + k : 0);
        copy_some(a.weight_chunk, stage + (n * a.b_pitch + k) * sizeof(Value), reinterpret_cast<const char*>(from),
                  real ? a.weight_chunk : 0);
    }
}

VK_DEVICE void copies_wait(int pending) {
    switch (pending) {
        case 0: copy_wait<0>(); break;
        case 1: copy_wait<1>(); break;
        default: copy_wait<2>();
    }
}

template <class T, class Loader, int BM_, int BN_, int WM_, int WN_>
struct ForwardKernel {
    using Kind_ = T;
    using Loader_ = Loader;
    static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, THREADS = BM / WM * (BN / WN) * 32;
    // Blocks that a multiprocessor has registers for, 128 a thread: one multiplies while another writes tokens.
    static constexpr int RESIDENT = 512 / THREADS;
};

template <class K>
VK_KERNEL(K::THREADS, K::RESIDENT) forward_kernel(VK_GRID_CONSTANT ForwardArguments a) {
    using T = typename K::Kind_;
    using Loader = typename K::Loader_;
    using Value = typename Kind<T>::Value;
    using Sum = typename Kind<T>::Sum;
    using Stored = typename Loader::Stored;
    constexpr int BM = K::BM, BN = K::BN, WM = K::WM, WN = K::WN, THREADS = K::THREADS;
    int64_t block = block_index();
    if (block >= a.tiles) {
        write_prefix<Sum>(a, (block - a.tiles) * THREADS + thread_index());
        return;
    }
    // Neighbouring blocks share their patches, not their weights: the weight stays in the L2 cache anyway.
    int64_t m0 = a.by_tiles_n.div(static_cast<uint32_t>(block)), d0 = (block - m0 * a.by_tiles_n.value) * BN;
    m0 *= BM;
    int row = warp_index() / (BN / WN) * WM, column = warp_index() % (BN / WN) * WN;
    char* stages = shared_memory() + a.table_bytes;
    Loader loader(a, shared_memory(), BM, THREADS);
    loader.start(m0);
    sync_block();
    auto place = loader.place(m0);


    auto issue = [&](int step) {
        if (step < a.steps) {
            char* stage = stages + step % a.stages * a.stage_bytes;
            loader.issue(stage, step);
            copy_weight<Value>(a, stage + a.a_bytes, d0, step, BN, THREADS);
        }
        copy_commit();  // an empty group, too: groups are counted
    };
    constexpr int K_STEP = WarpTile<T, WM, WN>::K_STEP;
    WarpTile<T, WM, WN> tile;
    tile.clear();
    for (int step = 0; step < a.stages - 1; ++step) issue(step);
    for (int step = 0; step < a.steps; ++step) {
        copies_wait(a.stages - 2);
        sync_block();  // the step's stage is there for all, and the one before has been read by all
        issue(step + a.stages - 1);
        char* stage = stages + step % a.stages * a.stage_bytes;
        const Value* weights = reinterpret_cast<const Value*>(stage + a.a_bytes);
        int left = a.layout.K - step * a.step_k, stop = left < a.step_k ? left : a.step_k;
        auto multiply = [&](const auto& patches) {
#pragma unroll(same<T, float> ? 2 : 1)  // with more the others run out of registers
            for (int k = 0; k < stop; k += K_STEP) {
                if constexpr (K_STEP == 16)
                    tile.step(patches, row, AlongK<Value>{weights, a.b_pitch}, column, k);
                else
                    tile.step(patches, row, Elements<Value>{weights, a.b_pitch, 1}, column, k);
            }
        };
        if constexpr (!Loader::OPERANDS) {
            Pixels<T, Stored, decltype(place), WM> pixels(a, place, row);
            pixels.enter(stage, step * a.step_k);
            multiply(pixels);
        } else if constexpr (K_STEP == 16) {
            multiply(AlongK<Value>{reinterpret_cast<const Value*>(stage), loader.pitch() / 2});
        } else {
            multiply(Elements<Value>{reinterpret_cast<const Value*>(stage), loader.pitch() / int(sizeof(Value)), 1});
        }
    }
    copy_wait<0>();
    sync_block();  // the stages have been read by all: the epilogue's staging takes their place

    constexpr int PITCH = WN + STAGING_PAD;
    Sum* staged = reinterpret_cast<Sum*>(stages) + warp_index() * STAGED_ROWS * PITCH;
    auto write = [&](int part) {
        tile.put(part, staged, PITCH);
        sync_warp();
        write_staged<WN>(a, staged, PITCH, d0 + column, [&](int r, Token& token) {
            int64_t m = m0 + row + part * STAGED_ROWS + r;
            if (m >= a.M) return false;
            token = token_of(a, m);
            return true;
        });
        sync_warp();
    };
    if constexpr (Kind<T>::K_STEP > 0) {
#pragma unroll 1  // write_staged is long, and would stand there for each
        for (int part = 0; part < WM / STAGED_ROWS; ++part) {
            compute_here(d0), compute_here(m0);
            write(part);
        }
    } else {  // float64's sums leave no register for a loop
#pragma unroll
        for (int part = 0; part < WM / STAGED_ROWS; ++part) write(part);
    }
}

// From a plan to an instantiated kernel

template <class K>
void launch_forward(const ForwardLaunch& l) {
    launch(forward_kernel<K>, l.plan.blocks + ceil_div(l.prefixes, K::THREADS), K::THREADS, l.plan.shared_bytes,
           l.stream, l.arguments, "the forward");
}

// On tensor cores: the tiles are forward_plan.py's MMA_TILES.
template <class T, class Loader>
void launch_tile(const ForwardLaunch& l) {
    if (l.plan.BM == 128 && l.plan.BN == 128) return launch_forward<ForwardKernel<T, Loader, 128, 128, 64, 32>>(l);
    if (l.plan.BM == 32 && l.plan.BN == 64) return launch_forward<ForwardKernel<T, Loader, 32, 64, 16, 32>>(l);
    no_kernel(l.plan.BM, l.plan.BN);
}

template <class Pixel>
using CopyPixels = Copy<Pixel, false>;

template <class T, template <class> class Loader>
void launch_pixels(const ForwardLaunch& l) {
    using Value = typename Kind<T>::Value;
    if (l.p.image == Dtype::u8)
        launch_tile<T, Loader<uint8_t>>(l);
    else if (l.p.image == l.p.compute)
        launch_tile<T, Loader<Value>>(l);
    else if constexpr (!same<Value, float>)
        launch_tile<T, Loader<float>>(l);
}

template <class T>
void launch_loader(const ForwardLaunch& l) {
    switch (l.plan.loader) {
        case LoaderKind::copy:
            if constexpr (Kind<T>::K_STEP == 16)
                if (l.p.image == l.p.compute && !l.arguments.centred) return launch_tile<T, Copy<T, true>>(l);
            return launch_pixels<T, CopyPixels>(l);
        case LoaderKind::rows: return launch_pixels<T, ImageRows>(l);
        default: return launch_forward<ForwardKernel<T, Gather<T>, 32, 64, 16, 32>>(l);
    }
}

// Without tensor cores: forward_plan.py's PLAIN_TILES
template <class T>
void launch_plain(const ForwardLaunch& l) {
    if constexpr (same<T, float>)
        if (l.plan.loader == LoaderKind::copy) {
            bool bytes = l.p.image == Dtype::u8;
            return bytes ? launch_forward<ForwardKernel<T, CopyPixels<uint8_t>, 64, 64, 32, 32>>(l)
                         : launch_forward<ForwardKernel<T, CopyPixels<float>, 64, 64, 32, 32>>(l);
        }
    launch_forward<ForwardKernel<T, Gather<T>, 64, 64, 32, 32>>(l);
}

}  // namespace vk
