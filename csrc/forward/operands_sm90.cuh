// What the kernel of sm90.cuh multiplies where patches do not lie as wgmma reads them: the consumers' operands, put together
// in registers from what a stage holds of the patches. A part is a STEP of k, 32 bytes of operands; an object of these has
//   enter(stage, k0)      the stage that begins with element k0
//   (r, first, i)         part first + i of it, of the warp's 16 patches; `first` is a multiple of 4, i is known
// Letters: problem.h.
#pragma once

#include "forward/producers_sm90.cuh"

namespace vk {

#if VK_SM90A

// float32 elements as what TF32 holds of them, and of the rest
VK_DEVICE void divide(uint32_t (&whole)[4], uint32_t (&rest)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float x = from_bits(whole[i]);
        whole[i] = to_tf32(x);
        rest[i] = to_tf32(x - from_bits(whole[i]));
    }
}

// Where a part begins in a stage's boxes of patches: bytes
template <class K>
VK_DEVICE int part_offset(const ForwardArguments& a, int part) {
    constexpr int BOX = K::Loader::BOX, STEP = Kind<typename K::T>::K_STEP;
    int across = a.layout.P_w / STEP, row = part / across, x = (part - row * across) * STEP;
    return ((x / BOX * a.stage_rows + row) * (K::BM * BOX) + x % BOX) * int(sizeof(typename K::Loader::Stored));
}

// Where channels lie side by side, m and a of y = (x − m)·a for each element of a stage, which are those of every stage
VK_DEVICE bool has_constants(const ForwardArguments& a) { return a.centred && a.layout.channels_last; }
template <class K>
VK_DEVICE void fill_constants(const ForwardArguments& a, float* constants) {
    if (!has_constants(a)) return;
    for (int k = thread_index(); k < a.step_k; k += K::THREADS) {
        Normal<float> normal(a, k);
        constants[2 * k] = normal.m, constants[2 * k + 1] = normal.a;
    }
}

// From boxes. In each part a lane's pixels lie alike, so that only where the part begins is left to be found.
template <class K>
struct BoxedPixels {
    using T = typename K::T;
    using Pixel = typename K::Loader::Stored;
    static constexpr int SIZE = sizeof(Pixel), BOX = K::Loader::BOX, STEP = Kind<T>::K_STEP, HALF = STEP / 2;
    static constexpr int EACH = STEP / 8;  // elements of a register
    struct alignas(EACH * 8) Normals { Normal<float> of[EACH]; };
    const ForwardArguments& a;
    const char* constants;  // of the lane's elements of a part
    int places[2];          // bytes from where a part begins: its pixels of row g, and those half a STEP on
    int offsets[4];         // of the first parts
    const char* stage;
    int k0;
    Normals normals;        // of a stage of one channel
    bool alike;

    VK_DEVICE BoxedPixels(const ForwardArguments& a, const float* constants, int row) : a(a) {
        int e = lane_index() % 4 * EACH;
        this->constants = reinterpret_cast<const char*>(constants + 2 * e);
        places[0] = ((row + lane_index() / 4) * BOX + e) * SIZE;
        places[1] = places[0] + (HALF < BOX ? HALF : a.stage_rows * K::BM * BOX) * SIZE;
#pragma unroll
        for (int i = 0; i < 4; ++i) offsets[i] = part_offset<K>(a, i);
    }
    VK_DEVICE void enter(const char* from, int k) {
        stage = from, k0 = k;
        if (!a.centred || a.layout.channels_last) return;
        int last = k0 + a.step_k < a.layout.K ? k0 + a.step_k - 1 : a.layout.K - 1;
        alike = channel_of(a.layout, k0) == channel_of(a.layout, last);
        look_up(k0);
    }
    VK_DEVICE void operator()(uint32_t (&r)[4], int first, int i) {
        int k = (first + i) * STEP;
        // A stage of more than four parts has one row of pixels.
        const char* from = stage + (first == 0 ? offsets[i] : (k / BOX * (K::BM * BOX) + k % BOX) * SIZE);
        if (!a.centred) return put_together<false>(r, from, [&](int) { return normals; });
        if (has_constants(a))
            return put_together<true>(r, from, [&](int half) {
                return *reinterpret_cast<const Normals*>(constants + (k + half * HALF) * 8);
            });
        if (!alike) look_up(k0 + k);  // a part is within a row of pixels, and so of one channel
        put_together<true>(r, from, [&](int) { return normals; });
    }

  private:
    VK_DEVICE void look_up(int k) {
        Normal<float> normal(a, k);
#pragma unroll
        for (int i = 0; i < EACH; ++i) normals.of[i] = normal;
    }
    template <bool NORMALISED, class NormalsOf>
    VK_DEVICE void put_together(uint32_t (&r)[4], const char* from, const NormalsOf& normals_of) const {
        struct alignas(EACH * SIZE) Pixels { Pixel x[EACH]; };
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Normals normal = normals_of(half);
#pragma unroll
            for (int low = 0; low < 2; ++low) {
                const char* at = from + places[half] + low * (8 * BOX * SIZE);
                uint32_t& to = r[2 * half + low];
                if constexpr (same<T, Pixel> && !NORMALISED) {
                    to = *reinterpret_cast<const uint32_t*>(at);
                } else {
                    Pixels pixels = *reinterpret_cast<const Pixels*>(at);
                    float x[EACH];
#pragma unroll
                    for (int i = 0; i < EACH; ++i)
                        x[i] = NORMALISED ? normal.of[i](to_float(pixels.x[i])) : to_float(pixels.x[i]);
                    if constexpr (EACH == 2)
                        to = pack(x[0], x[1], T{});
                    else
                        to = same<T, tf32> ? to_tf32(x[0]) : bits_of(x[0]);
                }
            }
        }
    }
};

// From rows of the image, as sm80.cuh reads them
template <class K>
struct RowPixels : Pixels<typename K::T, typename K::Loader::Stored, InRows, 16> {
    using Pixel = typename K::Loader::Stored;

    VK_DEVICE RowPixels(const ForwardArguments& a, int64_t m0, int row)
        : Pixels<typename K::T, Pixel, InRows, 16>(a, ImageRows<Pixel>(a, nullptr, K::BM, 128).place(m0), row) {}
    VK_DEVICE void operator()(uint32_t (&r)[4], int first, int i) const {
        this->fragment(r, this->first, (first + i) * Kind<typename K::T>::K_STEP);
    }
};

#endif

}  // namespace vk
