// The thin layer between the kernels and the machine: what a thread can do besides plain C++.
//
// Kernels use nothing of CUDA but these names. Here they are PTX; tests/host/primitives.h has them once more for a
// CPU, so that the very source of the kernels runs in tests on a machine without a GPU.
#pragma once

#include "common/problem.h"

#if !defined(__CUDACC__)
#include "host/primitives.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define VK_DEVICE __device__ __forceinline__
// A kernel of at most so many threads in a block, `resident` blocks on a multiprocessor.
#define VK_KERNEL(threads, resident) __global__ void __launch_bounds__(threads, resident)
#define VK_GRID_CONSTANT const __grid_constant__

// wgmma and the copy engine's tensors: only where the code is compiled for sm_90a.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VK_SM90A 1
#else
#define VK_SM90A 0
#endif

namespace vk {

using half = __half;
using bfloat16 = __nv_bfloat16;
using TensorMap = CUtensorMap;  // made on the host (driver.h)
using Barrier = uint64_t;       // of asynchronous copies, in shared memory

// Threads

VK_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
VK_DEVICE int64_t block_index() { return blockIdx.x; }
VK_DEVICE int64_t block_count() { return gridDim.x; }

// When all blocks have said so, or ended, the next launch may begin if it may do so early (launch.h).
VK_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// There: until what the launch before it wrote is there
VK_DEVICE void wait_for_prerequisites() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

VK_DEVICE char* shared_memory() {  // of the block, as much as the launch asked for, aligned to 1024 bytes
    extern __shared__ __align__(1024) char memory[];
    return memory;
}
VK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

VK_DEVICE void sync_block() { __syncthreads(); }
VK_DEVICE void sync_warp() { __syncwarp(); }
// Among `threads` threads of the block (a multiple of 32), those that name the same id in 1 … 15.
VK_DEVICE void sync_some(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <class T>
VK_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

VK_DEVICE void stop_with_error() { asm volatile("trap;"); }

// What follows from x is computed from here on, not ahead of a loop, where it would take registers all the time.
VK_DEVICE void compute_here(int64_t& x) { asm volatile("" : "+l"(x)); }

// Numbers

template <class T>
VK_DEVICE T read_once(const T* p) {  // from global memory that no thread writes
    return __ldg(p);
}
VK_DEVICE void write_words(void* p, const uint32_t (&w)[4]) {  // to global memory; left to itself nvcc 13.0 splits it
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
}
VK_DEVICE uint32_t pack(float low, float high, half) {
    __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&v);
}
VK_DEVICE uint32_t pack(float low, float high, bfloat16) {
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&v);
}
VK_DEVICE uint32_t to_tf32(float x) {  // rounded to the nearest, ties away from zero
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
VK_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
VK_DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }
VK_DEVICE float to_float(float x) { return x; }
VK_DEVICE float to_float(half x) { return __half2float(x); }
VK_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
VK_DEVICE float to_float(uint8_t x) { return static_cast<float>(x); }
VK_DEVICE float to_float(double x) { return __double2float_rn(x); }
template <class T>
VK_DEVICE T from_float(float x);
template <>
VK_DEVICE float from_float<float>(float x) { return x; }
template <>
VK_DEVICE double from_float<double>(float x) { return x; }
template <>
VK_DEVICE half from_float<half>(float x) { return __float2half_rn(x); }
template <>
VK_DEVICE bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Copies from global to shared memory that go on while the thread does (sm_80). BYTES is 4, 8 or 16, and both addresses
// are multiples of it; bytes from `real` on are zeros, and where `real` is 0 nothing is read.

template <int BYTES>
VK_DEVICE void copy_async(void* shared, const void* global, int real = BYTES) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                     "r"(real) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                     "n"(BYTES), "r"(real) : "memory");
}
VK_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
VK_DEVICE void copy_wait() {  // until at most PENDING of the thread's committed groups are under way
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Tensor cores by warp (sm_80). Fragments: with g = lane / 4 and t = lane % 4,
//   16 bits: a = {(g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8)}, b = {(2t, g), (2t+8, g)}, pairs along k
//   tf32:    a = {(g, t), (g+8, t), (g, t+4), (g+8, t+4)}, b = {(t, g), (t+4, g)}
//   sums:    c = {(g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1)}

// Four 8×8 matrices of 16 bits; lane i gives the address of row i % 8 of matrix i / 8, 16 bytes, and gets of each
// matrix row g, columns 2t and 2t+1; transposed: rows 2t and 2t+1 of column g.
VK_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
VK_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

#define VK_MMA(shape, type)                                                                                          \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "       \
                 "{%8,%9}, {%0,%1,%2,%3};"                                                                           \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
// c += a·b, of 16×16 and 16×8 elements of 16 bits, or 16×8 and 8×8 of tf32 (T = float)
template <class T>
VK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
VK_DEVICE void multiply_add<half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    VK_MMA("m16n8k16", "f16");
}
template <>
VK_DEVICE void multiply_add<bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    VK_MMA("m16n8k16", "bf16");
}
template <>
VK_DEVICE void multiply_add<float>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    VK_MMA("m16n8k8", "tf32");
}
#undef VK_MMA

// Hopper (sm_90a)

#if VK_SM90A

// Among all threads of a cluster, blocks side by side in the grid, that have not returned
VK_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The 16 bytes that a block of the cluster has where this one's shared memory has `p`
VK_DEVICE void read_words_of(int rank, const void* p, uint32_t (&w)[4]) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [there];\n}"
        : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(shared_address(p)), "r"(rank) : "memory");
}

// A barrier's phase ends when `count` arrivals have come and all bytes that were announced.
VK_DEVICE void barrier_init(Barrier* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
VK_DEVICE void barrier_init_done() {  // makes the initialised barriers known to the copy engine
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
VK_DEVICE void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
VK_DEVICE void barrier_arrive(Barrier* barrier, int rank) {  // where that block of the cluster has this barrier
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)), "r"(rank)
        : "memory");
}
VK_DEVICE void barrier_expect(Barrier* barrier, int bytes) {  // arrives, and announces bytes of the copy engine
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
VK_DEVICE void barrier_arrive_after_copies(Barrier* barrier) {  // when the thread's copy_async so far have landed
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
VK_DEVICE void barrier_wait(Barrier* barrier, uint32_t phase) {  // until the phase of this parity has ended
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}

// What this thread has written to shared memory is what the copy engine reads of it from here on.
VK_DEVICE void fence_copy_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// One block of a tensor, at these coordinates (the innermost first), to shared memory; its bytes count at `barrier`.
VK_DEVICE void copy_tensor(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2,%3,%4}], [%5];" ::"r"(shared_address(shared)), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier))
                 : "memory");
}
VK_DEVICE void copy_tensor(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, int c3,
                           int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2,%3,%4,%5,%6}], [%7];" ::"r"(shared_address(shared)), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
                 "r"(shared_address(barrier)) : "memory");
}
// The same place in each of the cluster's `blocks` blocks gets it, whose own barrier counts its bytes.
VK_DEVICE void copy_tensor_to_all(void* shared, const TensorMap* map, Barrier* barrier, int blocks, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2,%3,%4}], [%5], %6;" ::"r"(shared_address(shared)), "l"(map), "r"(c0), "r"(c1), "r"(c2),
                 "r"(shared_address(barrier)), "h"(static_cast<uint16_t>((1 << blocks) - 1))
                 : "memory");
}
VK_DEVICE void copy_tensor_to_all(void* shared, const TensorMap* map, Barrier* barrier, int blocks, int c0, int c1, int c2,
                                  int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%2,%3,%4,%5,%6}], [%7], %8;" ::"r"(shared_address(shared)), "l"(map), "r"(c0), "r"(c1),
                 "r"(c2), "r"(c3), "r"(c4), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>((1 << blocks) - 1))
                 : "memory");
}
// And from shared memory to the tensor, but for what lies outside of it. Until stores_wait, shared memory must stay.
VK_DEVICE void store_tensor(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2,%3,%4,%5,%6}], [%1];" ::"l"(map),
                 "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}
VK_DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>
VK_DEVICE void stores_wait() {  // until at most PENDING of the thread's committed groups still read shared memory
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
VK_DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// load_matrices the other way: lane i gives the address to which row i % 8 of matrix i / 8 goes.
VK_DEVICE void store_matrices(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

VK_DEVICE void store_pair(void* to, float low, float high) { *static_cast<float2*>(to) = {low, high}; }  // shared memory

// Registers of the threads of this warpgroup from here on.
template <int COUNT>
VK_DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
VK_DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Tensor cores by warpgroup: 64×16 of A, from registers or shared memory, by 16×N of B from shared memory; 8 along k of
// TF32.
VK_DEVICE void warpgroup_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
VK_DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
VK_DEVICE void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

#include "common/wgmma.inc"

#endif  // VK_SM90A

}  // namespace vk

#endif  // __CUDACC__

namespace vk {

// Where byte `at` of a block comes to lie that the copy engine swizzles within SPAN bytes; 16: not at all. Threads that
// copy do the same.
template <int SPAN>
VK_BOTH int swizzled(int at) {
    return at ^ (at >> 7 & (SPAN / 16 - 1)) << 4;
}

// An operand in shared memory, k innermost, as wgmma reads it (PTX ISA, "Asynchronous warpgroup level matrix shared
// memory layout"): rows of SPAN bytes (32 or 128) lie one behind the other, their 16-byte pieces swizzled as the copy
// engine swizzles them. Bits: start / 16 at 0, leading offset / 16 at 16 (unused), offset of the next 8 rows / 16 at
// 32, swizzle at 62 (1: 128 bytes, 3: 32 bytes).
template <int SPAN>
VK_BOTH uint64_t matrix_descriptor(uint32_t address) {
    static_assert(SPAN == 32 || SPAN == 128, "a swizzle of 32 or 128 bytes");
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t{1} << 16 |
           static_cast<uint64_t>(8 * SPAN >> 4) << 32 | uint64_t{SPAN == 128 ? 1 : 3} << 62;
}

// The same with rows (columns) innermost, SPAN / 2 of them in a line of SPAN bytes, a line for each k one behind the
// other; the next SPAN / 2 begin `next` bytes on. There the leading offset is that, and the other one is to the next 8
// of k (PTX ISA, "Canonical layouts", MN-major; no GPU has confirmed it yet): 16 of k are two such groups, and a step
// along k moves the start by them.
template <int SPAN>
VK_BOTH uint64_t matrix_descriptor_across(uint32_t address, int next) {
    static_assert(SPAN == 32 || SPAN == 128, "a swizzle of 32 or 128 bytes");
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(next >> 4) << 16 |
           static_cast<uint64_t>(8 * SPAN >> 4) << 32 | uint64_t{SPAN == 128 ? 1 : 3} << 62;
}

}  // namespace vk
