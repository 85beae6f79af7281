// Numbers in memory: loads and stores of any dtype, of one or of eight at a time, and what a product is made of.
#pragma once

#include "common/ptx.cuh"

namespace vk {

// The kinds of product: the operands' type in memory, the sum's, and the elements of k in one step of the tensor cores
// (0: without them).
struct tf32 {};
struct tf32x3 {};  // float32, by three products of what TF32 holds of an operand and what it holds of the rest
template <class T>
struct Kind {  // half, bfloat16
    using Value = T;
    using Sum = float;
    static constexpr int K_STEP = 16;
};
template <>
struct Kind<tf32> {
    using Value = float;
    using Sum = float;
    static constexpr int K_STEP = 8;
};
template <>
struct Kind<tf32x3> : Kind<tf32> {};
template <>
struct Kind<float> {
    using Value = float;
    using Sum = float;
    static constexpr int K_STEP = 0;
};
template <>
struct Kind<double> {
    using Value = double;
    using Sum = double;
    static constexpr int K_STEP = 0;
};

template <class A, class B>
inline constexpr bool same = false;
template <class A>
inline constexpr bool same<A, A> = true;

// To the nearest, ties to even; to 16 bits from f64 by way of f32.
template <class To, class From>
VK_DEVICE To to(From x) {
    if constexpr (same<To, From>)
        return x;
    else if constexpr (same<To, double> && same<From, uint8_t>)
        return static_cast<double>(x);
    else
        return from_float<To>(to_float(x));
}

// Element `at` of a tensor of floats or bytes.
template <class Sum>
VK_DEVICE Sum load(const void* data, Dtype dtype, int64_t at) {
    switch (dtype) {
        case Dtype::u8: return to<Sum>(static_cast<const uint8_t*>(data)[at]);
        case Dtype::f16: return to<Sum>(static_cast<const half*>(data)[at]);
        case Dtype::bf16: return to<Sum>(static_cast<const bfloat16*>(data)[at]);
        case Dtype::f32: return to<Sum>(static_cast<const float*>(data)[at]);
        default: return to<Sum>(static_cast<const double*>(data)[at]);
    }
}

template <class Sum>
VK_DEVICE void store(void* data, Dtype dtype, int64_t at, Sum value) {
    switch (dtype) {
        case Dtype::f16: static_cast<half*>(data)[at] = to<half>(value); break;
        case Dtype::bf16: static_cast<bfloat16*>(data)[at] = to<bfloat16>(value); break;
        case Dtype::f32: static_cast<float*>(data)[at] = to<float>(value); break;
        default: static_cast<double*>(data)[at] = to<double>(value);
    }
}

VK_DEVICE int64_t load_index(const void* data, Dtype dtype, int64_t at) {
    switch (dtype) {
        case Dtype::i64: return static_cast<const int64_t*>(data)[at];
        case Dtype::i32: return static_cast<const int32_t*>(data)[at];
        case Dtype::i16: return static_cast<const int16_t*>(data)[at];
        case Dtype::i8: return static_cast<const int8_t*>(data)[at];
        default: return static_cast<const uint8_t*>(data)[at];
    }
}

struct alignas(16) Words {  // what one instruction loads or stores
    uint32_t word[4];
};

template <class T>
VK_DEVICE bool is_aligned(const T* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Eight elements side by side, in as few loads as their alignment allows; those from `count` on are left alone.
template <class T, class Sum>
VK_DEVICE void load_eight(Sum (&values)[8], const T* from, int64_t step, int count) {
    if (step == 1 && count == 8 && is_aligned(from)) {
        constexpr int EACH = 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < 8; i += EACH < 8 ? EACH : 8) {
            union { Words words; T values[EACH]; } v;
            v.words = *reinterpret_cast<const Words*>(from + i);
#pragma unroll
            for (int j = 0; j < (EACH < 8 ? EACH : 8); ++j) values[i + j] = to<Sum>(v.values[j]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) values[i] = to<Sum>(from[i * step]);
    }
}

template <class Sum>
VK_DEVICE void load_eight(Sum (&values)[8], const void* data, Dtype dtype, int64_t at, int64_t step, int count) {
    switch (dtype) {
        case Dtype::f16: return load_eight(values, static_cast<const half*>(data) + at, step, count);
        case Dtype::bf16: return load_eight(values, static_cast<const bfloat16*>(data) + at, step, count);
        case Dtype::f32: return load_eight(values, static_cast<const float*>(data) + at, step, count);
        default: return load_eight(values, static_cast<const double*>(data) + at, step, count);
    }
}

template <class T, class Sum>
VK_DEVICE void store_eight(T* to_, const Sum (&values)[8], int count) {
    if (count == 8 && is_aligned(to_)) {
        constexpr int EACH = 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < 8; i += EACH) {
            union { Words words; T values[EACH]; } v;
#pragma unroll
            for (int j = 0; j < EACH; ++j) v.values[j] = to<T>(values[i + j]);
            write_words(to_ + i, v.words.word);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) to_[i] = to<T>(values[i]);
    }
}

template <class Sum>
VK_DEVICE void store_eight(void* data, Dtype dtype, int64_t at, const Sum (&values)[8], int count) {
    switch (dtype) {
        case Dtype::f16: return store_eight(static_cast<half*>(data) + at, values, count);
        case Dtype::bf16: return store_eight(static_cast<bfloat16*>(data) + at, values, count);
        case Dtype::f32: return store_eight(static_cast<float*>(data) + at, values, count);
        default: return store_eight(static_cast<double*>(data) + at, values, count);
    }
}

}  // namespace vk
