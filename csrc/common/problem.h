// The problem as C++ sees it: sizes, strides and dtypes, and the arithmetic that host and kernels share.
//
// Letters, as in vitkernels/problem.py:
//   B C F H W     images, channels, frames (1 for a picture), height, width
//   P S pad       patch size, stride, padding, each (t, y, x); a picture has P_t = S_t = 1
//   G N           patch grid (t, y, x); N = G_t·G_h·G_w patches of one image
//   K             C·P_t·P_h·P_w, the length of one flattened patch
//   D T           embedding width; prefix tokens in front of the patches
//   rows          patches embedded of each image: N, or N_keep of them
#pragma once

#include <cstdint>
#include <string>

#if defined(__CUDACC__)
#define VK_BOTH __host__ __device__ __forceinline__
#else
#define VK_BOTH inline
#endif

namespace vk {

enum class Dtype : int { u8, f16, bf16, f32, f64, i8, i16, i32, i64 };

VK_BOTH constexpr int size_of(Dtype d) {
    switch (d) {
        case Dtype::u8: case Dtype::i8: return 1;
        case Dtype::f16: case Dtype::bf16: case Dtype::i16: return 2;
        case Dtype::f32: case Dtype::i32: return 4;
        default: return 8;
    }
}

struct Problem {
    int64_t B, C, F, H, W;
    int64_t P[3], S[3], pad[3], G[3];
    int64_t D, T, N, rows, K;
    bool keep;                  // whether patches are listed in `keep`
    int64_t pos_rows;           // 0, N or T + N
    int64_t strides[5];         // of images [B, C, F, H, W], in elements
    bool normalised;            // whether pixels are normalised one by one: y = (x − m[c])·a[c]
    double scale;               // otherwise, of the sum
    Dtype image, weight, compute, out;  // compute: of the product's operands, summed in f32 (f64 for f64)
    bool tf32;                  // f32 operands may be rounded to TF32
    int device;                 // its number; -1: the current one
    std::string text;           // for people
};

// Of the grids of all frames; kept patches are one line
inline int64_t lines_of(const Problem& p) { return p.keep ? 1 : p.G[0] * p.G[1]; }
inline int64_t columns_of(const Problem& p) { return p.keep ? p.rows : p.G[2]; }

// A tensor where it lies: absent where data is null. Tables have a batch stride of 0 where all images share one.
struct Tensor {
    void* data;
    Dtype dtype;
    int64_t strides[5];
};

using Stream = void*;  // a cudaStream_t

VK_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
VK_BOTH constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Division of 0 ≤ n < 2³¹ by a divisor known on the host, as a multiplication and a shift
// (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct Divisor {
    uint32_t value, factor, shift;

    Divisor() = default;
    explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)), factor(0), shift(0) {
        while ((uint64_t{1} << shift) < value) ++shift;
        factor = static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value + 1);
    }
    VK_BOTH uint32_t div(uint32_t n) const {
        uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * factor) >> 32);
        return (high + n) >> shift;
    }
    VK_BOTH uint32_t mod(uint32_t n) const { return n - div(n) * value; }
};

}  // namespace vk
