// How patches come into shared memory (gather, copy, rows), and operands of the product out of it. Letters: problem.h.
#pragma once

#include "forward/forward.h"
#include "common/warp_mma.cuh"

namespace vk {

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

// Operands put together from pixels in shared memory. A place says where they are, in bytes: row r's pixels begin at
// place.row(r), its element k (of the whole patch) lies at place.k(k) − place.stage(k0) from there in a stage from k0 on.

// y = (x − m)·a for element k of a patch
template <class Sum>
struct Normal {
    Sum m = 0, a = 1;

    Normal() = default;
    VK_DEVICE Normal(const ForwardArguments& f, int k) {
        const Sum* centred = static_cast<const Sum*>(f.centred);
        int c = channel_of(f.layout, k < f.layout.K ? k : f.layout.K - 1);
        m = read_once(centred + c), a = read_once(centred + f.C + c);
    }
    VK_DEVICE Sum operator()(Sum x) const { return (x - m) * a; }
};

template <class T, class Stored, class Place, int WM>
struct Pixels {
    const ForwardArguments& a;
    Place place;
    int first, t;           // row of the warp's WM; lane % 4
    int rows[WM / 16 * 2];  // where its lanes' rows begin
    const char* stage;
    int k0;
    Normal<typename Kind<T>::Sum> normal;  // of the stage's elements, if they are
    bool alike;                            // of one channel: then none of them waits for its constants

    VK_DEVICE Pixels(const ForwardArguments& a, const Place& place, int first) 
        : a(a), place(place), first(first), t(lane_index() % 4) {
#pragma unroll
        for (int i = 0; i < WM / 16 * 2; ++i) rows[i] = place.row(first + lane_index() / 4 + 8 * i);
    }
    VK_DEVICE void enter(const char* from, int k) {
        k0 = k;
        stage = from - place.stage(k0);
        if (!a.centred) return;
        int last = k0 + a.step_k < a.layout.K ? k0 + a.step_k - 1 : a.layout.K - 1;
        alike = !a.layout.channels_last && channel_of(a.layout, k0) == channel_of(a.layout, last);
        normal = Normal<typename Kind<T>::Sum>(a, k0);
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
                even = odd = normal;
                if (!alike) even = odd = Normal<float>(a, at);
                if (!alike && !same<T, tf32> && (a.layout.channels_last || a.layout.P_w % 2))
                    odd = Normal<float>(a, at + 1);
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
        corners[r] = corner_of(a.layout, token.b, token.n);
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
        bool padded = is_padded(a.layout);
        for (int at = thread_index(); at < BM * a.step_k; at += threads) {
            int r = at / a.step_k, k = step * a.step_k + at % a.step_k;
            Sum x = 0;
            if (k < a.layout.K) {
                Element e = element_of(a.layout, k);
                Corner c = corners[r];
                if (!padded || is_inside(a.layout, c, e)) {
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
        bool padded = is_padded(a.layout);
        int each = a.chunk / static_cast<int>(sizeof(Pixel)), across = a.step_k / each;  // a power of 2, ≤ threads
        int column = thread_index() % across * each, k = step * a.step_k + column;
        Element e = element_of(a.layout, k < a.layout.K ? k : 0);
        for (int r = thread_index() / across; r < BM; r += threads / across) {
            Corner c = corners[r];
            bool real = k < a.layout.K && (!padded || is_inside(a.layout, c, e));
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
        const PatchLayout& w = a.layout;
        constexpr int size = sizeof(Pixel);
        return {w.by_P_w, w.by_G_w, w.P_w, size, a.slot_bytes, a.chunk, w.S_w * size, a.segment_bytes,
                static_cast<int>(w.by_G_w.mod(static_cast<uint32_t>(m0)))};
    }

    VK_DEVICE void start(int64_t m0) {
        constexpr int size = sizeof(Pixel);
        int64_t first = a.layout.by_G_w.mod(static_cast<uint32_t>(m0));
        for (int s = thread_index(); s < a.segments; s += threads) {
            int64_t m = s == 0 ? m0 : m0 - first + s * a.layout.G_w;
            int64_t stop = m0 - first + (s + 1) * a.layout.G_w;  // the next line
            stop = stop < m0 + BM ? stop : m0 + BM;
            stop = stop < a.M ? stop : a.M;
            Segment segment{0, 0, 0};
            if (m < stop) {
                Token token = token_of(a, m);
                int64_t begin = (s == 0 ? first : 0) * a.layout.S_w * size, ahead = begin % a.chunk;
                segment.offset = corner_of(a.layout, token.b, token.n).offset * size - ahead;
                segment.bytes = static_cast<int>(((stop - m - 1) * a.layout.S_w + a.layout.P_w) * size + ahead);
                int64_t until = int64_t{a.layout.W} * size - begin + ahead;
                segment.until = static_cast<int>(until < (1 << 30) ? until : 1 << 30);
            }
            table[s] = segment;
        }
    }

    VK_DEVICE void issue(char* stage, int step) const {
        int k0 = step * a.step_k, q0 = a.layout.by_P_w.div(k0), chunks = a.by_row_chunks.value;
        int rows = static_cast<int>(a.layout.by_P_w.div(k0 + a.step_k - 1)) - q0 + 1;
        for (int each = thread_index(); each < rows * chunks; each += threads) {
            int j = a.by_row_chunks.div(each), at = each - j * chunks;
            int s = a.by_segment_chunks.div(at), from = at * a.chunk - s * a.segment_bytes;
            Segment segment = table[s];
            if (from >= segment.bytes) continue;
            int k = (q0 + j) * a.layout.P_w, left = segment.until - from;
            bool real = k < a.layout.K;  // what is multiplied by no weight must be 0 all the same: it could be NaN
            int64_t row = real ? element_of(a.layout, k).offset * static_cast<int>(sizeof(Pixel)) : 0;
            copy_some(a.chunk, stage + j * a.slot_bytes + s * a.segment_bytes + from,
                      static_cast<const char*>(a.images) + (real ? segment.offset + row + from : 0),
                      !real ? 0 : left < a.chunk ? left : a.chunk);
        }
    }
};

}  // namespace vk
