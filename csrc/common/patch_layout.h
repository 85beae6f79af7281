// Where patches lie in an image: where patch n of image b begins, where element k of a patch lies. All offsets are in
// elements and 64-bit. Host and kernels run the same functions; tests take them past 2³¹.
#pragma once

#include "common/problem.h"

namespace vk {

// A channels-last image is read as one channel of rows W·C wide: (y, x, c) in memory order is (y, x') with
// x' = x·C + c, so its pixels are read as wide as those of a planar image. Then k counts (t, y, x, c), not (c, t, y, x).
struct PatchLayout {
    int F, H, W;
    int S_t, S_h, S_w, pad_t, pad_h, pad_w;
    int P_t, P_h, P_w, K;
    int64_t b, c, f, h, w;    // strides
    int64_t G_h, G_w;
    Divisor by_G_h, by_G_w;
    Divisor by_P_w, by_P_h, by_P_t;
    Divisor by_channel;       // elements of one channel in a patch; where channels lie side by side, their number
    bool channels_last;
};

struct Corner {  // of a patch: its first element, and the frame, row and pixel of that
    int64_t offset;
    int f, h, w;
};

struct Element {  // of a patch: its offset from the first, and its frame, row and pixel in the patch
    int64_t offset;
    int t, y, x;
};

// Patches of a line that begin on 16 bytes together, and have a tensor map each; at most
inline constexpr int MOST_IN_GROUP = 8;

inline bool is_channels_last(const Problem& p, const int64_t (&strides)[5]) {
    return p.C > 1 && strides[1] == 1 && strides[4] == p.C;
}

inline PatchLayout layout_of(const Problem& p, const int64_t (&strides)[5]) {
    bool last = is_channels_last(p, strides);
    int64_t wide = last ? p.C : 1;
    PatchLayout w{};
    w.F = static_cast<int>(p.F), w.H = static_cast<int>(p.H), w.W = static_cast<int>(p.W * wide);
    w.S_t = static_cast<int>(p.S[0]), w.S_h = static_cast<int>(p.S[1]), w.S_w = static_cast<int>(p.S[2] * wide);
    w.pad_t = static_cast<int>(p.pad[0]), w.pad_h = static_cast<int>(p.pad[1]);
    w.pad_w = static_cast<int>(p.pad[2] * wide);
    w.P_t = static_cast<int>(p.P[0]), w.P_h = static_cast<int>(p.P[1]), w.P_w = static_cast<int>(p.P[2] * wide);
    w.K = static_cast<int>(p.K);
    w.b = strides[0], w.c = last ? 0 : strides[1], w.f = strides[2], w.h = strides[3], w.w = last ? 1 : strides[4];
    w.G_h = p.G[1], w.G_w = p.G[2];
    w.by_G_h = Divisor(w.G_h), w.by_G_w = Divisor(w.G_w);
    w.by_P_w = Divisor(w.P_w), w.by_P_h = Divisor(w.P_h), w.by_P_t = Divisor(w.P_t);
    w.by_channel = Divisor(last ? p.C : p.P[0] * p.P[1] * p.P[2]);
    w.channels_last = last;
    return w;
}

// … as the copy engine brings patches to wgmma: rows of pixels go to a multiple of 16, and zeros are behind a patch's own.
inline PatchLayout padded(PatchLayout w) {
    int P_w = static_cast<int>(round_up(w.P_w, 16));
    w.K = w.K / w.P_w * P_w;
    if (!w.channels_last) w.by_channel = Divisor(w.by_channel.value / w.P_w * P_w);
    w.P_w = P_w, w.by_P_w = Divisor(P_w);
    return w;
}

VK_BOTH Corner corner_of(const PatchLayout& w, int64_t b, int64_t n) {
    int64_t line = w.by_G_w.div(static_cast<uint32_t>(n)), frame = w.by_G_h.div(static_cast<uint32_t>(line));
    Corner c;
    c.f = static_cast<int>(frame * w.S_t - w.pad_t);
    c.h = static_cast<int>((line - frame * w.G_h) * w.S_h - w.pad_h);
    c.w = static_cast<int>((n - line * w.G_w) * w.S_w - w.pad_w);
    c.offset = b * w.b + c.f * w.f + c.h * w.h + c.w * w.w;
    return c;
}

VK_BOTH Element element_of(const PatchLayout& w, int k) {
    uint32_t row = w.by_P_w.div(k), frame = w.by_P_h.div(row), channel = w.by_P_t.div(frame);
    Element e;
    e.x = k - row * w.P_w;
    e.y = row - frame * w.P_h;
    e.t = frame - channel * w.P_t;
    e.offset = channel * w.c + e.t * w.f + e.y * w.h + e.x * w.w;
    return e;
}

VK_BOTH int channel_of(const PatchLayout& w, int k) {
    return static_cast<int>(w.channels_last ? w.by_channel.mod(k) : w.by_channel.div(k));
}

VK_BOTH bool is_padded(const PatchLayout& w) { return w.pad_t > 0 || w.pad_h > 0 || w.pad_w > 0; }

VK_BOTH bool is_inside(const PatchLayout& w, const Corner& c, const Element& e) {
    int f = c.f + e.t, h = c.h + e.y, x = c.w + e.x;
    return f >= 0 && f < w.F && h >= 0 && h < w.H && x >= 0 && x < w.W;
}

// The place of element k of a patch, in the order of the layout, in a weight [D, C, P_t, P_h, P_w] with these strides.
VK_BOTH int64_t weight_offset(const PatchLayout& w, int k, const int64_t (&strides)[5]) {
    uint32_t row = w.by_P_w.div(k), frame = w.by_P_h.div(row), channel = w.by_P_t.div(frame);
    int64_t x = k - row * w.P_w, y = row - frame * w.P_h, t = frame - channel * w.P_t, c = channel;
    if (w.channels_last) {
        c = w.by_channel.mod(static_cast<uint32_t>(x));
        x = w.by_channel.div(static_cast<uint32_t>(x));
    }
    return c * strides[1] + t * strides[2] + y * strides[3] + x * strides[4];
}

}  // namespace vk
