// The names of csrc/common/ptx.cuh for a CPU: the same signatures, on threads that are fibers (emulator.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "host/emulator.h"
#include "common/problem.h"

#define VK_DEVICE inline
#define VK_KERNEL(threads, resident) void
#define VK_GRID_CONSTANT const
#define VK_SM90A 1

namespace vk {

// 16-bit floats as CUDA has them: storage, and conversions that round to the nearest, ties to even.
struct half {
    uint16_t bits;
};
struct bfloat16 {
    uint16_t bits;
};

namespace host {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float half_to_float(uint16_t h) {
    // The exponent's bias grows from 15 to 127 in a product by 2¹¹², which is exact and makes subnormals normal.
    float x = float_of(static_cast<uint32_t>(h & 0x7fff) << 13) * 0x1p112f;
    uint32_t bits = bits_of(x) | static_cast<uint32_t>(h & 0x8000) << 16;
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    return float_of(bits);
}
inline uint16_t half_from_float(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7fff;
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520, halfway from 65504 to 65536
    if (bits < 0x38800000)  // below 2⁻¹⁴ fp16 has steps of 2⁻²⁴, which are those of floats about 0.5
        return static_cast<uint16_t>(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)));
    bits += 0xfff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)));
}
inline float bfloat16_to_float(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }
inline uint16_t bfloat16_from_float(float x) {
    uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
inline constexpr Dtype dtype_of = Dtype::f32;
template <>
inline constexpr Dtype dtype_of<half> = Dtype::f16;
template <>
inline constexpr Dtype dtype_of<bfloat16> = Dtype::bf16;

}  // namespace host

// Threads

inline int thread_index() { return host::here.thread; }
inline int64_t block_index() { return host::here.block; }
inline int64_t block_count() { return host::here.blocks; }

inline char* shared_memory() { return host::here.shared; }
inline uint32_t shared_address(const void* p) { return host::shared_address(p); }

inline void sync_block() { host::sync(0, 0); }
inline void sync_warp() { host::sync_warp("sync_warp"); }
inline void sync_some(int id, int threads) {
    if (id < 1 || id > 15) host::fail("sync_some(" + std::to_string(id) + ", …): not an id in 1 … 15");
    host::sync(id, threads);
}

inline void launch_dependents() {}
inline void wait_for_prerequisites() { host::wait_for_prerequisites(); }

inline void sync_cluster() { host::sync_cluster(); }

inline void read_words_of(int rank, const void* p, uint32_t (&w)[4]) { host::read_words_of(rank, p, w); }

inline void compute_here(int64_t&) {}

inline void stop_with_error() { host::fail("the kernel stopped with an error"); }

template <class T>
inline T shuffle(T value, int lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = host::shuffle(bits, lane);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// Numbers

inline void write_words(void* p, const uint32_t (&w)[4]) { std::memcpy(p, w, 16); }
template <class T>
inline T read_once(const T* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) host::fail("read_once at a misaligned address");
    return *p;
}
inline uint32_t pack(float low, float high, half) {
    return host::half_from_float(low) | static_cast<uint32_t>(host::half_from_float(high)) << 16;
}
inline uint32_t pack(float low, float high, bfloat16) {
    return host::bfloat16_from_float(low) | static_cast<uint32_t>(host::bfloat16_from_float(high)) << 16;
}
inline uint32_t bits_of(float x) { return host::bits_of(x); }
inline float from_bits(uint32_t bits) { return host::float_of(bits); }
inline uint32_t to_tf32(float x) {
    uint32_t bits = host::bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
    return (bits + 0x1000) & ~0x1fffu;
}
inline float to_float(float x) { return x; }
inline float to_float(half x) { return host::half_to_float(x.bits); }
inline float to_float(bfloat16 x) { return host::bfloat16_to_float(x.bits); }
inline float to_float(uint8_t x) { return static_cast<float>(x); }
inline float to_float(double x) { return static_cast<float>(x); }
template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline double from_float<double>(float x) { return x; }
template <>
inline half from_float<half>(float x) { return {host::half_from_float(x)}; }
template <>
inline bfloat16 from_float<bfloat16>(float x) { return {host::bfloat16_from_float(x)}; }

// Copies

template <int BYTES>
inline void copy_async(void* shared, const void* global, int real = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    host::copy_async(shared, global, BYTES, real);
}
inline void copy_commit() { host::copy_commit(); }
template <int PENDING>
inline void copy_wait() {
    host::copy_wait(PENDING);
}

// Tensor cores by warp

inline void load_matrices(uint32_t (&r)[4], const void* row) { host::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { host::load_matrices(r, row, true); }

template <class T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    host::multiply_add(c, a, b0, b1, host::dtype_of<T>);
}

// Hopper

inline void barrier_init(Barrier* barrier, int count) { host::barrier_init(barrier, count); }
inline void barrier_init_done() { host::barrier_init_done(); }
inline void barrier_arrive(Barrier* barrier) { host::barrier_arrive(barrier); }
inline void barrier_arrive(Barrier* barrier, int rank) { host::barrier_arrive(barrier, rank); }
inline void barrier_expect(Barrier* barrier, int bytes) { host::barrier_expect(barrier, bytes); }
inline void barrier_arrive_after_copies(Barrier* barrier) { host::barrier_arrive_after_copies(barrier); }
inline void barrier_wait(Barrier* barrier, uint32_t phase) { host::barrier_wait(barrier, phase); }

inline void copy_tensor(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2) {
    host::copy_tensor(shared, map, barrier, 3, {c0, c1, c2, 0, 0});
}
inline void copy_tensor(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, int c3, int c4) {
    host::copy_tensor(shared, map, barrier, 5, {c0, c1, c2, c3, c4});
}
inline void copy_tensor_to_all(void* shared, const TensorMap* map, Barrier* barrier, int blocks, int c0, int c1, int c2) {
    host::copy_tensor_to_all(shared, map, barrier, blocks, 3, {c0, c1, c2, 0, 0});
}
inline void copy_tensor_to_all(void* shared, const TensorMap* map, Barrier* barrier, int blocks, int c0, int c1, int c2,
                               int c3, int c4) {
    host::copy_tensor_to_all(shared, map, barrier, blocks, 5, {c0, c1, c2, c3, c4});
}
inline void fence_copy_engine() { host::fence_copy_engine(); }
inline void store_tensor(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3, int c4) {
    host::store_tensor(map, shared, 5, {c0, c1, c2, c3, c4});
}
inline void stores_commit() { host::stores_commit(); }
template <int PENDING>
inline void stores_wait() {
    host::stores_wait(PENDING);
}
inline void store_pair(void* to, float low, float high) { host::store_pair(to, low, high); }
inline void store_matrices(void* row, const uint32_t (&r)[4]) { host::store_matrices(row, r); }
inline void prefetch_map(const TensorMap* map) { host::check_map(map, 0, "prefetch_map"); }

template <int COUNT>
inline void more_registers() {
    static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "setmaxnreg takes 24 … 256 in steps of 8");
    host::sync_warp("more_registers");
}
template <int COUNT>
inline void fewer_registers() {
    static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "setmaxnreg takes 24 … 256 in steps of 8");
    host::sync_warp("fewer_registers");
}

inline void warpgroup_fence() { host::warpgroup_fence(); }
inline void warpgroup_commit() { host::warpgroup_commit(); }
template <int PENDING>
inline void warpgroup_wait() {
    static_assert(PENDING >= 0 && PENDING <= 7, "wgmma.wait_group takes 0 … 7");
    host::warpgroup_wait(PENDING);
}

template <int COUNT>
inline constexpr bool has_sums = COUNT == 32 || COUNT == 64 || COUNT == 96 || COUNT == 128;

template <bool ACROSS = false, int COUNT, class T>
inline void warpgroup_multiply_add(float (&c)[COUNT], const uint32_t (&a)[4], uint64_t b, T) {
    static_assert(has_sums<COUNT>, "wgmma.inc has N = 64, 128, 192 and 256");
    host::warpgroup_multiply_add(c, 2 * COUNT, a, 0, b, host::dtype_of<T>, ACROSS, ACROSS);
}
template <bool ACROSS = false, bool A_ACROSS = ACROSS, int COUNT, class T>
inline void warpgroup_multiply_add(float (&c)[COUNT], uint64_t a, uint64_t b, T) {
    static_assert(sizeof(T) == 2, "wgmma.inc has TF32 with its left operand in registers alone");
    static_assert(has_sums<COUNT>, "wgmma.inc has N = 64, 128, 192 and 256");
    host::warpgroup_multiply_add(c, 2 * COUNT, nullptr, a, b, host::dtype_of<T>, ACROSS, A_ACROSS);
}

}  // namespace vk
