// The forward by warps: tokens = patches·Wᵀ + bias + position, a block making BM patches × BN channels of them.
// For sm_80 and later; hopper.cuh is the road of sm_90a. Letters: problem.h.
//
// A ring of stages in shared memory is filled by asynchronous copies, `step_k` of k at a time, while earlier stages are
// multiplied. What a stage holds of the patches is the source's affair (gather, copy, rows); operands are put together,
// converted and normalised as they are read from it.
#pragma once

#include "forward.h"
#include "launch.h"
#include "tile.cuh"

namespace vk {

// The tokens

struct Token {
    int64_t b, i, n;  // patch n of image b is its token T + i
    bool real;        // n is a patch
};

VK_DEVICE Token token_of(const ForwardArguments& a, int64_t m) {
    Token t;
    t.b = a.by_rows.div(static_cast<uint32_t>(m));
    t.i = m - t.b * a.rows;
    t.n = t.i;
    t.real = true;
    if (a.keep.data) {
        t.n = load_index(a.keep.data, a.keep.dtype, t.b * a.keep.strides[0] + t.i * a.keep.strides[1]);
        t.real = t.n >= 0 && t.n < a.N;
        if (!t.real) t.n = 0;
    }
    return t;
}

// A slice of sums [SLAB, COLUMNS] to tokens, each row by neighbouring lanes, eight channels a lane:
//   out[b, T+i, d …] = sums·scale + bias[d …] + pos[b, first + n, d …]
// row(r, token) says which token row r is, and whether it is one. What is added is loaded for all rows before the first
// token is written: a load can't be moved before a store that might be to the same place.
template <int COLUMNS, class Sum, class Row>
VK_DEVICE void write_slice(const ForwardArguments& a, const Sum* slice, int pitch, int64_t d0, const Row& row) {
    constexpr int ACROSS = COLUMNS / 8, TURNS = SLAB * ACROSS / 32;
    int c = lane_index() % ACROSS * 8, first = lane_index() / ACROSS;
    int64_t d = d0 + c;
    int count = static_cast<int>(a.D - d < 8 ? a.D - d : 8);
    if (count <= 0) return;
    Sum bias[8] = {}, extra[TURNS][8];
    if (a.bias.data)
        load_eight(bias, a.bias.data, a.bias.dtype, d * a.bias.strides[0], a.bias.strides[0], count);
    Token tokens[TURNS];
    bool there[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
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
    for (int i = 0; i < TURNS; ++i) {
        if (!there[i]) continue;
        union { Words words[sizeof(Sum) / 2]; Sum values[8]; } sums;
#pragma unroll
        for (int w = 0; w < int(sizeof(Sum)) / 2; ++w)
            sums.words[w] = reinterpret_cast<const Words*>(slice + (first + i * (32 / ACROSS)) * pitch + c)[w];
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

// Operands put together from pixels in shared memory. A place says where they are, in bytes: row r's pixels begin at
// place.row(r), its element k (of the whole patch) lies at place.k(k) − place.stage(k0) from there in a stage from k0 on.

// y = (x − m)·a for element k of a patch
template <class Sum>
struct Normal {
    Sum m = 0, a = 1;

    Normal() = default;
    VK_DEVICE Normal(const ForwardArguments& f, int k) {
        const Sum* centred = static_cast<const Sum*>(f.centred);
        int c = channel_of(f.walk, k < f.walk.K ? k : f.walk.K - 1);
        m = read_once(centred + c), a = read_once(centred + f.C + c);
    }
    VK_DEVICE Sum operator()(Sum x) const { return (x - m) * a; }
};

template <class T, class Stored, class Place, int WM>
struct Pixels {
    const ForwardArguments& a;
    const Place& place;
    int first, t;           // row of the warp's WM; lane % 4
    int rows[WM / 16 * 2];  // where its lanes' rows begin
    const char* stage;
    int k0;

    VK_DEVICE Pixels(const ForwardArguments& a, const Place& place, int first) 
        : a(a), place(place), first(first), t(lane_index() % 4) {
#pragma unroll
        for (int i = 0; i < WM / 16 * 2; ++i) rows[i] = place.row(first + lane_index() / 4 + 8 * i);
    }
    VK_DEVICE void enter(const char* from, int k) {
        k0 = k;
        stage = from - place.stage(k0);
    }
    VK_DEVICE void fragment(uint32_t (&r)[4], int row, int k) const {
        int i = (row - first) / 16 * 2;
        a.centred ? put_together<true>(r, i, k) : put_together<false>(r, i, k);
    }
    VK_DEVICE typename Kind<T>::Sum operator()(int row, int k) const {
        using Sum = typename Kind<T>::Sum;
        Sum x = to<Sum>(*reinterpret_cast<const Stored*>(stage + place.row(row) + place.k(k0 + k)));
        return a.centred ? Normal<Sum>(a, k0 + k)(x) : x;
    }

  private:
    template <bool NORMALISED>
    VK_DEVICE void put_together(uint32_t (&r)[4], int i, int k) const {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int at = k0 + k + (same<T, tf32> ? t + 4 * h : 2 * t + 8 * h);
            const char* from = stage + place.k(at);
            Normal<float> even, odd;  // of elements k and k + 1: alike within a row of one channel
            if constexpr (NORMALISED) {
                even = odd = Normal<float>(a, at);
                if (!same<T, tf32> && (a.walk.channels_last || a.walk.P_w % 2)) odd = Normal<float>(a, at + 1);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const char* pixel = from + rows[i + e];
                if constexpr (same<T, tf32>) {
                    float x = to_float(*reinterpret_cast<const Stored*>(pixel));
                    r[2 * h + e] = to_tf32(NORMALISED ? even(x) : x);
                } else if constexpr (same<T, Stored> && !NORMALISED) {
                    r[2 * h + e] = *reinterpret_cast<const uint32_t*>(pixel);
                } else {
                    struct alignas(2 * sizeof(Stored)) Pair { Stored x[2]; };
                    Pair pair = *reinterpret_cast<const Pair*>(pixel);
                    float low = to_float(pair.x[0]), high = to_float(pair.x[1]);
                    r[2 * h + e] = NORMALISED ? pack(even(low), odd(high), T{}) : pack(low, high, T{});
                }
            }
        }
    }
};

// Sources. OPERANDS: they store the product's operands; otherwise pixels, which are made operands as they are read.

VK_DEVICE void copy_some(int bytes, char* shared, const char* global, int real) {
    switch (bytes) {
        case 16: copy_async<16>(shared, global, real); break;
        case 8: copy_async<8>(shared, global, real); break;
        case 4: copy_async<4>(shared, global, real); break;
        default: *reinterpret_cast<uint16_t*>(shared) = real > 0 ? *reinterpret_cast<const uint16_t*>(global) : 0;
    }
}

// [BM][step_k + 16 bytes], from patches that each row's corner begins
struct Beside {
    int pitch, size;  // bytes

    VK_DEVICE int row(int r) const { return r * pitch; }
    VK_DEVICE int k(int k) const { return k * size; }
    VK_DEVICE int stage(int k0) const { return k0 * size; }
};

VK_DEVICE void find_corners(const ForwardArguments& a, Corner* corners, int64_t m0, int BM, int threads) {
    for (int r = thread_index(); r < BM; r += threads) {  // rows past the end repeat the last, and are not written
        Token token = token_of(a, m0 + r < a.M ? m0 + r : a.M - 1);
        corners[r] = corner_of(a.walk, token.b, token.n);
    }
}

// One by one, converted and normalised on their way: any strides, padding, dtype.
template <class T>
struct Gather {
    using Stored = typename Kind<T>::Value;
    static constexpr bool OPERANDS = true;
    using Sum = typename Kind<T>::Sum;
    const ForwardArguments& a;
    Corner* corners;  // [BM]
    int BM, threads;

    VK_DEVICE Gather(const ForwardArguments& a, char* table, int BM, int threads)
        : a(a), corners(reinterpret_cast<Corner*>(table)), BM(BM), threads(threads) {}
    VK_DEVICE void start(int64_t m0) { find_corners(a, corners, m0, BM, threads); }
    VK_DEVICE Beside place(int64_t) const { return {pitch(), sizeof(Stored)}; }
    VK_DEVICE int pitch() const { return a.step_k * static_cast<int>(sizeof(Stored)) + 16; }

    VK_DEVICE void issue(char* stage, int step) const {
        bool padded = is_padded(a.walk);
        for (int at = thread_index(); at < BM * a.step_k; at += threads) {
            int r = at / a.step_k, k = step * a.step_k + at % a.step_k;
            Sum x = 0;
            if (k < a.walk.K) {
                Element e = element_of(a.walk, k);
                Corner c = corners[r];
                if (!padded || is_inside(a.walk, c, e)) {
                    x = load<Sum>(a.images, a.image, c.offset + e.offset);
                    if (a.centred) x = Normal<Sum>(a, k)(x);
                }
            }
            *reinterpret_cast<Stored*>(stage + r * pitch() + at % a.step_k * sizeof(Stored)) = to<Stored>(x);
        }
    }
};

// `chunk` bytes at a time, as they lie: a chunk is inside the patch's row, and inside the image or the padding.
template <class Pixel, bool OPERANDS_>
struct Copy {
    using Stored = Pixel;
    static constexpr bool OPERANDS = OPERANDS_;
    const ForwardArguments& a;
    Corner* corners;  // [BM]
    int BM, threads;

    VK_DEVICE Copy(const ForwardArguments& a, char* table, int BM, int threads)
        : a(a), corners(reinterpret_cast<Corner*>(table)), BM(BM), threads(threads) {}
    VK_DEVICE void start(int64_t m0) { find_corners(a, corners, m0, BM, threads); }
    VK_DEVICE Beside place(int64_t) const { return {pitch(), sizeof(Pixel)}; }
    VK_DEVICE int pitch() const { return a.step_k * static_cast<int>(sizeof(Pixel)) + 16; }

    VK_DEVICE void issue(char* stage, int step) const {
        bool padded = is_padded(a.walk);
        int each = a.chunk / static_cast<int>(sizeof(Pixel)), across = a.step_k / each;  // a power of 2, ≤ threads
        int column = thread_index() % across * each, k = step * a.step_k + column;
        Element e = element_of(a.walk, k < a.walk.K ? k : 0);
        for (int r = thread_index() / across; r < BM; r += threads / across) {
            Corner c = corners[r];
            bool real = k < a.walk.K && (!padded || is_inside(a.walk, c, e));
            const Pixel* from = static_cast<const Pixel*>(a.images) + (real ? c.offset + e.offset : 0);
            copy_some(a.chunk, stage + r * pitch() + column * sizeof(Pixel), reinterpret_cast<const char*>(from),
                      real ? a.chunk : 0);
        }
    }
};

// Whole rows of the image. The tile's patches are runs of neighbours in a line of the grid, `segments` at most; a slot
// of a stage is one row (c, t, y) of all of them, each segment's pixels in a place of its own.
struct Segment {
    int64_t offset;  // in bytes, of its first copy in the image, for (c, t, y) = 0
    int bytes;       // to the end of its last patch
    int until;       // … to the end of the image's row
};

struct InRows {
    Divisor by_P_w, by_G_w;
    int P_w, size, slot_bytes, chunk, step, segment_bytes, first;  // first: the tile's first patch in its line

    VK_DEVICE int row(int r) const {
        int s = by_G_w.div(first + r), x = by_G_w.mod(first + r);
        int begin = s == 0 ? first * step : 0;  // of the segment in the image's row, in bytes
        return s * segment_bytes + x * step - begin / chunk * chunk;
    }
    VK_DEVICE int k(int k) const {
        int q = by_P_w.div(k);
        return q * slot_bytes + (k - q * P_w) * size;
    }
    VK_DEVICE int stage(int k0) const { return by_P_w.div(k0) * slot_bytes; }
};

template <class Pixel>
struct ImageRows {
    using Stored = Pixel;
    static constexpr bool OPERANDS = false;
    const ForwardArguments& a;
    Segment* table;  // [segments]
    int BM, threads;

    VK_DEVICE ImageRows(const ForwardArguments& a, char* table, int BM, int threads)
        : a(a), table(reinterpret_cast<Segment*>(table)), BM(BM), threads(threads) {}

    VK_DEVICE InRows place(int64_t m0) const {
        const Walk& w = a.walk;
        constexpr int size = sizeof(Pixel);
        return {w.by_P_w, w.by_G_w, w.P_w, size, a.slot_bytes, a.chunk, w.S_w * size, a.segment_bytes,
                static_cast<int>(w.by_G_w.mod(static_cast<uint32_t>(m0)))};
    }

    VK_DEVICE void start(int64_t m0) {
        constexpr int size = sizeof(Pixel);
        int64_t first = a.walk.by_G_w.mod(static_cast<uint32_t>(m0));
        for (int s = thread_index(); s < a.segments; s += threads) {
            int64_t m = s == 0 ? m0 : m0 - first + s * a.walk.G_w;
            int64_t stop = m0 - first + (s + 1) * a.walk.G_w;  // the next line
            stop = stop < m0 + BM ? stop : m0 + BM;
            stop = stop < a.M ? stop : a.M;
            Segment segment{0, 0, 0};
            if (m < stop) {
                Token token = token_of(a, m);
                int64_t begin = (s == 0 ? first : 0) * a.walk.S_w * size, ahead = begin % a.chunk;
                segment.offset = corner_of(a.walk, token.b, token.n).offset * size - ahead;
                segment.bytes = static_cast<int>(((stop - m - 1) * a.walk.S_w + a.walk.P_w) * size + ahead);
                int64_t until = int64_t{a.walk.W} * size - begin + ahead;
                segment.until = static_cast<int>(until < (1 << 30) ? until : 1 << 30);
            }
            table[s] = segment;
        }
    }

    VK_DEVICE void issue(char* stage, int step) const {
        int k0 = step * a.step_k, q0 = a.walk.by_P_w.div(k0), chunks = a.by_row_chunks.value;
        int rows = static_cast<int>(a.walk.by_P_w.div(k0 + a.step_k - 1)) - q0 + 1;
        for (int each = thread_index(); each < rows * chunks; each += threads) {
            int j = a.by_row_chunks.div(each), at = each - j * chunks;
            int s = a.by_segment_chunks.div(at), from = at * a.chunk - s * a.segment_bytes;
            Segment segment = table[s];
            if (from >= segment.bytes) continue;
            int k = (q0 + j) * a.walk.P_w, left = segment.until - from;
            bool real = k < a.walk.K;  // what is multiplied by no weight must be 0 all the same: it could be NaN
            int64_t row = real ? element_of(a.walk, k).offset * static_cast<int>(sizeof(Pixel)) : 0;
            copy_some(a.chunk, stage + j * a.slot_bytes + s * a.segment_bytes + from,
                      static_cast<const char*>(a.images) + (real ? segment.offset + row + from : 0),
                      !real ? 0 : left < a.chunk ? left : a.chunk);
        }
    }
};

// The kernel

// The weight's rows d0 …, k0 …, `weight_chunk` bytes at a time: [BN][b_pitch]
template <class Value>
VK_DEVICE void copy_weight(const ForwardArguments& a, char* stage, int64_t d0, int step, int BN, int threads) {
    int each = a.weight_chunk / static_cast<int>(sizeof(Value)), across = a.by_weight_chunks.value;
    int k0 = step * a.step_k;
    for (int at = thread_index(); at < BN * across; at += threads) {
        int n = a.by_weight_chunks.div(at), k = (at - n * across) * each;
        bool real = d0 + n < a.D && k0 + k < a.walk.K;
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

template <class T, class Source, int BM_, int BN_, int WM_, int WN_>
struct ForwardKernel {
    using Kind_ = T;
    using Source_ = Source;
    static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, THREADS = BM / WM * (BN / WN) * 32;
    // Blocks that a multiprocessor has registers for, 128 a thread: one multiplies while another writes tokens.
    static constexpr int RESIDENT = 512 / THREADS;
};

template <class K>
VK_KERNEL(K::THREADS, K::RESIDENT) forward_kernel(VK_GRID_CONSTANT ForwardArguments a) {
    using T = typename K::Kind_;
    using Source = typename K::Source_;
    using Value = typename Kind<T>::Value;
    using Sum = typename Kind<T>::Sum;
    using Stored = typename Source::Stored;
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
    Source source(a, shared_memory(), BM, THREADS);
    source.start(m0);
    sync_block();
    auto place = source.place(m0);


    auto issue = [&](int step) {
        if (step < a.steps) {
            char* stage = stages + step % a.stages * a.stage_bytes;
            source.issue(stage, step);
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
        int left = a.walk.K - step * a.step_k, stop = left < a.step_k ? left : a.step_k;
        auto multiply = [&](const auto& patches) {
#pragma unroll(same<T, float> ? 2 : 1)  // with more the others run out of registers
            for (int k = 0; k < stop; k += K_STEP) {
                if constexpr (K_STEP == 16)
                    tile.step(patches, row, AlongK<Value>{weights, a.b_pitch}, column, k);
                else
                    tile.step(patches, row, Elements<Value>{weights, a.b_pitch, 1}, column, k);
            }
        };
        if constexpr (!Source::OPERANDS) {
            Pixels<T, Stored, decltype(place), WM> pixels(a, place, row);
            pixels.enter(stage, step * a.step_k);
            multiply(pixels);
        } else if constexpr (K_STEP == 16) {
            multiply(AlongK<Value>{reinterpret_cast<const Value*>(stage), source.pitch() / 2});
        } else {
            multiply(Elements<Value>{reinterpret_cast<const Value*>(stage), source.pitch() / int(sizeof(Value)), 1});
        }
    }
    copy_wait<0>();
    sync_block();  // the stages have been read by all: slices of sums take their place

    constexpr int PITCH = WN + SLICE_PAD;
    Sum* slice = reinterpret_cast<Sum*>(stages) + warp_index() * SLAB * PITCH;
#pragma unroll
    for (int slab = 0; slab < WM / SLAB; ++slab) {
        tile.put(slab, slice, PITCH);
        sync_warp();
        write_slice<WN>(a, slice, PITCH, d0 + column, [&](int r, Token& token) {
            int64_t m = m0 + row + slab * SLAB + r;
            if (m >= a.M) return false;
            token = token_of(a, m);
            return true;
        });
        sync_warp();
    }
}

// From a plan to an instantiated kernel

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
            bool bytes = l.p.image == Dtype::u8;
            return bytes ? launch_forward<ForwardKernel<T, CopyPixels<uint8_t>, 64, 64, 32, 32>>(l)
                         : launch_forward<ForwardKernel<T, CopyPixels<float>, 64, 64, 32, 32>>(l);
        }
    launch_forward<ForwardKernel<T, Gather<T>, 64, 64, 32, 32>>(l);
}

}  // namespace vk
