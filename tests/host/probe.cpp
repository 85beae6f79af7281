// Small kernels that prove the primitives, and mistakes that the emulator must see (tests/csrc/test_primitives.py).
//
// All but the mistakes are kernels like any other: nvcc -x cu takes this file as well, and a GPU must agree.
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/driver.h"
#include "common/launch.h"
#include "common/ptx.cuh"

namespace py = pybind11;
using namespace vk;

namespace {

using Address = uintptr_t;
template <class T>
T* at(Address a) {
    return reinterpret_cast<T*>(a);
}

// c = a·bᵀ, 16×k and 8×k, on one warp
struct Product {
    const void *a, *b;
    float* c;
    int k;
};
template <class T>
VK_KERNEL(32, 1) product_kernel(VK_GRID_CONSTANT Product p) {
    int g = thread_index() / 4, t = thread_index() % 4;
    float c[4] = {};
    if constexpr (sizeof(T) == 2) {
        const uint32_t *a = static_cast<const uint32_t*>(p.a), *b = static_cast<const uint32_t*>(p.b);
        int row = p.k / 2;
        for (int k = t; k < row; k += 8) {
            uint32_t fragment[4] = {a[g * row + k], a[(g + 8) * row + k], a[g * row + k + 4], a[(g + 8) * row + k + 4]};
            multiply_add<T>(c, fragment, b[g * row + k], b[g * row + k + 4]);
        }
    } else {
        const float *a = static_cast<const float*>(p.a), *b = static_cast<const float*>(p.b);
        for (int k = t; k < p.k; k += 8) {
            uint32_t fragment[4] = {to_tf32(a[g * p.k + k]), to_tf32(a[(g + 8) * p.k + k]),
                                    to_tf32(a[g * p.k + k + 4]), to_tf32(a[(g + 8) * p.k + k + 4])};
            multiply_add<T>(c, fragment, to_tf32(b[g * p.k + k]), to_tf32(b[g * p.k + k + 4]));
        }
    }
    for (int i = 0; i < 4; ++i) p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

void product(int dtype, Address a, Address b, Address c, int k) {
    Product p{at<void>(a), at<void>(b), at<float>(c), k};
    auto kernel = dtype == int(Dtype::f16)    ? product_kernel<half>
                  : dtype == int(Dtype::bf16) ? product_kernel<bfloat16>
                                              : product_kernel<float>;
    launch(kernel, 1, 32, 0, Stream{}, p, "product");
}

// 32 rows of 16 bytes through load_matrices: [transposed or not][lane][matrix] pairs
struct Matrices {
    const char* rows;
    uint32_t* out;
};
VK_KERNEL(32, 1) matrices_kernel(VK_GRID_CONSTANT Matrices p) {
    char* mine = shared_memory() + 16 * thread_index();
    copy_async<16>(mine, p.rows + 16 * thread_index());
    copy_commit();
    copy_wait<0>();
    sync_warp();
    uint32_t r[4];
    load_matrices(r, mine);
    for (int i = 0; i < 4; ++i) p.out[thread_index() * 4 + i] = r[i];
    load_matrices_transposed(r, mine);
    for (int i = 0; i < 4; ++i) p.out[128 + thread_index() * 4 + i] = r[i];
}

void matrices(Address rows, Address out) {
    launch(matrices_kernel, 1, 32, 512, Stream{}, Matrices{at<char>(rows), at<uint32_t>(out)}, "matrices");
}

// What a thread sees of its copies of 16, 8 and 4 bytes, each a group: once issued, then with 2, 1 and 0 pending
struct Copies {
    const char* from;  // 32 bytes of a thread
    char* out;         // [4][thread][32]
    int real;          // of the 16
};
VK_DEVICE void look(const Copies& p, int when, const char* mine) {
    for (int i = 0; i < 28; ++i) p.out[(when * 32 + thread_index()) * 32 + i] = mine[i];
}
VK_KERNEL(32, 1) copies_kernel(VK_GRID_CONSTANT Copies p) {
    char* mine = shared_memory() + 32 * thread_index();
    const char* from = p.from + 32 * thread_index();
    copy_async<16>(mine, from, p.real);
    copy_commit();
    copy_async<8>(mine + 16, from + 16);
    copy_commit();
    copy_async<4>(mine + 24, from + 24);
    copy_commit();
    look(p, 0, mine);
    copy_wait<2>();
    look(p, 1, mine);
    copy_wait<1>();
    look(p, 2, mine);
    copy_wait<0>();
    look(p, 3, mine);
}

void copies(Address from, Address out, int real) {
    launch(copies_kernel, 1, 32, 1024, Stream{}, Copies{at<char>(from), at<char>(out), real}, "copies");
}

// Lanes' numbers shuffled, summed, and a block's sum through shared memory
struct Sum {
    const int* in;
    int* out;  // [thread]: lane 5's, the warp's sum, the sums of the block's warps
};
VK_KERNEL(96, 1) sum_kernel(VK_GRID_CONSTANT Sum p) {
    int *sums = reinterpret_cast<int*>(shared_memory()), *out = p.out + 3 * thread_index();
    int x = p.in[thread_index()];
    out[0] = shuffle(x, 5);
    for (int mask = 16; mask; mask /= 2) x += shuffle(x, (thread_index() % 32) ^ mask);
    out[1] = x;
    if (thread_index() % 32 == 0) sums[thread_index() / 32] = x;
    if (thread_index() >= 64) {  // the third warp keeps to itself
        sync_warp();
        out[2] = sums[2];
    } else {
        sync_some(3, 64);
        out[2] = sums[0] + sums[1];
    }
}

void sum(Address in, Address out) {
    launch(sum_kernel, 1, 96, 12, Stream{}, Sum{at<int>(in), at<int>(out)}, "sum");
}

// Numbers turned round in each block, with a barrier or, wrongly, without
struct Turn {
    const float* in;
    float* out;
    bool sync;
};
VK_KERNEL(128, 1) turn_kernel(VK_GRID_CONSTANT Turn p) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    int t = thread_index();
    shared[t] = p.in[block_index() * 128 + t];
    if (p.sync) sync_block();
    p.out[block_index() * 128 + t] = shared[127 - t];
}

void turn(Address in, Address out, int blocks, bool sync) {
    launch(turn_kernel, blocks, 128, 512, Stream{}, Turn{at<float>(in), at<float>(out), sync}, "turn");
}

// One block of a tensor, as it lies in shared memory
struct Fetch {
    TensorMap map;
    char* out;
    int rank, bytes, at[5];
};
VK_KERNEL(32, 1) fetch_kernel(VK_GRID_CONSTANT Fetch p) {
#if VK_SM90A
    Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory() + round_up(p.bytes, 8));
    if (thread_index() == 0) {
        prefetch_map(&p.map);
        barrier_init(barrier, 1);
        barrier_init_done();
    }
    sync_block();
    if (thread_index() == 0) {
        barrier_expect(barrier, p.bytes);
        if (p.rank == 3)
            copy_tensor(shared_memory(), &p.map, barrier, p.at[0], p.at[1], p.at[2]);
        else
            copy_tensor(shared_memory(), &p.map, barrier, p.at[0], p.at[1], p.at[2], p.at[3], p.at[4]);
    }
    barrier_wait(barrier, 0);
    for (int i = thread_index(); i < p.bytes; i += 32) p.out[i] = shared_memory()[i];
#endif
}

// Rows of 16 pairs, as lanes have them of matrices, to a block of a tensor again and again, by way of two places in
// shared memory: of `rounds` blocks [1, 1, 16, 32] each 1 more than the one before. `mistake` leaves out what it names.
enum class Unstored : int { nothing, fence, meeting, wait, last_wait };
struct Put {
    TensorMap map;
    int rounds, at[4];
    Unstored mistake;
};
VK_KERNEL(32, 1) put_kernel(VK_GRID_CONSTANT Put p) {
#if VK_SM90A
    int lane = thread_index(), row = lane % 16, turn = row / 2 % 4;
    for (int round = 0; round < p.rounds; ++round) {
        char* block = shared_memory() + round % 2 * 1024;
        if (lane == 0 && p.mistake != Unstored::wait) stores_wait<1>();
        sync_warp();
        for (int half = 0; half < 2; ++half) {
            uint32_t pairs[4];
            for (int i = 0; i < 4; ++i) {  // matrix i: rows 8·(i % 2) …, columns 16·half + 8·(i / 2) …
                uint32_t first = static_cast<uint32_t>((lane / 4 + i % 2 * 8) * 32 + 16 * half + i / 2 * 8 + lane % 4 * 2 + round);
                pairs[i] = first | (first + 1) << 16;
            }
            store_matrices(block + row * 64 + ((2 * half + lane / 16) ^ turn) * 16, pairs);
        }
        if (p.mistake != Unstored::fence) fence_copy_engine();
        if (p.mistake != Unstored::meeting) sync_warp();
        if (lane == 0) {
            store_tensor(&p.map, block, p.at[0], p.at[1], p.at[2], p.at[3] + round, 0);
            stores_commit();
        }
    }
    if (lane == 0 && p.mistake != Unstored::last_wait) stores_wait<0>();
#endif
}

TensorBlock tensor_block(int dtype, const std::vector<uint64_t>& sizes, const std::vector<uint64_t>& strides,
                         const std::vector<uint32_t>& block, int swizzle) {
    TensorBlock t{};
    t.dtype = static_cast<Dtype>(dtype);
    t.rank = static_cast<int>(sizes.size());
    t.swizzle = swizzle;
    for (size_t i = 0; i < sizes.size() && i < 5; ++i) {
        t.sizes[i] = sizes[i];
        t.strides[i] = strides[i];
        t.block[i] = block[i];
    }
    return t;
}

void fetch(const TensorBlock& t, Address base, const std::vector<int>& where, Address out) {
    Fetch p{make_tensor_map(t, at<void>(base)), at<char>(out), t.rank, size_of(t.dtype), {}};
    for (int i = 0; i < t.rank; ++i) {
        p.bytes *= static_cast<int>(t.block[i]);
        p.at[i] = where[static_cast<size_t>(i)];
    }
    launch(fetch_kernel, 1, 32, static_cast<int>(round_up(p.bytes, 8)) + 8, Stream{}, p, "fetch");
}

// Into [rounds, 3, rows, columns] of 16-bit numbers, at row `y` and column `x` of its second plane
void put(Address out, int rounds, int rows, int columns, int y, int x, int mistake) {
    uint64_t row = static_cast<uint64_t>(columns), plane = row * static_cast<uint64_t>(rows);
    TensorBlock t = tensor_block(int(Dtype::i16), {row, static_cast<uint64_t>(rows), 3, static_cast<uint64_t>(rounds), 1},
                                 {2, 2 * row, 2 * plane, 6 * plane, 16}, {32, 16, 1, 1, 1}, 64);
    Put p{make_tensor_map(t, at<void>(out)), rounds, {x, y, 1, 0}, static_cast<Unstored>(mistake)};
    launch(put_kernel, 1, 32, 2048, Stream{}, p, "put");
}

// c = a·bᵀ, 64×k and n×k, on a warpgroup, from blocks that the copy engine swizzled
struct GroupProduct {
    TensorMap a_map, b_map;
    const void* a;
    float* c;
    int k;
};
template <class T, int N, int SPAN, bool FROM_REGISTERS>
VK_KERNEL(128, 1) group_product_kernel(VK_GRID_CONSTANT GroupProduct p) {
#if VK_SM90A
    constexpr int WIDTH = SPAN / 2;  // of a block, in elements
    int blocks = p.k / WIDTH, thread = thread_index();
    char *a = shared_memory(), *b = a + blocks * 64 * SPAN;
    Barrier* barrier = reinterpret_cast<Barrier*>(b + blocks * N * SPAN);
    if (thread == 0) {
        barrier_init(barrier, 1);
        barrier_init_done();
    }
    sync_block();
    if (thread == 0) {
        barrier_expect(barrier, blocks * (64 + N) * SPAN);
        for (int i = 0; i < blocks; ++i) {
            copy_tensor(a + i * 64 * SPAN, &p.a_map, barrier, i * WIDTH, 0, 0);
            copy_tensor(b + i * N * SPAN, &p.b_map, barrier, i * WIDTH, 0, 0);
        }
    }
    barrier_wait(barrier, 0);
    float c[N / 2] = {};
    int g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    const uint32_t* a_pairs = static_cast<const uint32_t*>(p.a);
    for (int k = 0; k < p.k; k += 16) {
        int block = k / WIDTH, inside = k % WIDTH * 2;
        uint64_t b_descriptor = matrix_descriptor<SPAN>(shared_address(b + block * N * SPAN) + inside);
        if constexpr (FROM_REGISTERS) {
            uint32_t fragment[4];
            for (int i = 0; i < 4; ++i) fragment[i] = a_pairs[((g + i % 2 * 8) * p.k + k) / 2 + t + i / 2 * 4];
            warpgroup_fence();
            warpgroup_multiply_add(c, fragment, b_descriptor, T());
            warpgroup_commit();
            warpgroup_wait<0>();
        } else {
            warpgroup_fence();
            warpgroup_multiply_add(c, matrix_descriptor<SPAN>(shared_address(a + block * 64 * SPAN) + inside),
                                   b_descriptor, T());
            warpgroup_commit();
            warpgroup_wait<1>();
        }
    }
    warpgroup_wait<0>();
    for (int i = 0; i < N / 2; ++i) p.c[(g + i / 2 % 2 * 8) * N + i / 4 * 8 + 2 * t + i % 2] = c[i];
#endif
}

template <class T, int N, int SPAN>
void group_product_of(bool from_registers, const GroupProduct& p) {
    int bytes = p.k * 2 * (64 + N) + 8;
    if (from_registers)
        launch(group_product_kernel<T, N, SPAN, true>, 1, 128, bytes, Stream{}, p, "group_product");
    else
        launch(group_product_kernel<T, N, SPAN, false>, 1, 128, bytes, Stream{}, p, "group_product");
}

template <class T>
void group_product_of(int n, int span, bool from_registers, const GroupProduct& p) {
    auto product = n == 64    ? span == 32 ? group_product_of<T, 64, 32> : group_product_of<T, 64, 128>
                   : n == 128 ? span == 32 ? group_product_of<T, 128, 32> : group_product_of<T, 128, 128>
                   : span == 32 ? group_product_of<T, 256, 32> : group_product_of<T, 256, 128>;
    product(from_registers, p);
}

void group_product(int dtype, Address a, Address b, Address c, int n, int k, int span, bool from_registers) {
    auto map = [&](Address base, int rows) {
        uint64_t row = static_cast<uint64_t>(2 * k), height = static_cast<uint64_t>(rows);
        uint32_t width = static_cast<uint32_t>(span / 2);
        return make_tensor_map(tensor_block(dtype, {row / 2, height, 1}, {2, row, row * height},
                                            {width, static_cast<uint32_t>(rows), 1}, span), at<void>(base));
    };
    GroupProduct p{map(a, 64), map(b, n), at<void>(a), at<float>(c), k};
    if (dtype == int(Dtype::f16))
        group_product_of<half>(n, span, from_registers, p);
    else
        group_product_of<bfloat16>(n, span, from_registers, p);
}

// c = aᵀ·b, k×64 and k×n, on a warpgroup: both lie with k outermost, in blocks of SPAN bytes across and all of k
template <class T, int N, int SPAN, bool FROM_REGISTERS>
VK_KERNEL(128, 1) group_across_kernel(VK_GRID_CONSTANT GroupProduct p) {
#if VK_SM90A
    constexpr int WIDTH = SPAN / 2;
    int thread = thread_index(), next = p.k * SPAN;
    char *a = shared_memory(), *b = a + p.k * 128;
    Barrier* barrier = reinterpret_cast<Barrier*>(b + p.k * N * 2);
    if (thread == 0) {
        barrier_init(barrier, 1);
        barrier_init_done();
    }
    sync_block();
    if (thread == 0) {
        barrier_expect(barrier, p.k * (64 + N) * 2);
        for (int i = 0; i < 64; i += WIDTH) copy_tensor(a + i * p.k * 2, &p.a_map, barrier, i, 0, 0);
        for (int i = 0; i < N; i += WIDTH) copy_tensor(b + i * p.k * 2, &p.b_map, barrier, i, 0, 0);
    }
    barrier_wait(barrier, 0);
    float c[N / 2] = {};
    int g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    const uint16_t* numbers = static_cast<const uint16_t*>(p.a);
    for (int k = 0; k < p.k; k += 16) {
        uint64_t b_descriptor = matrix_descriptor_across<SPAN>(shared_address(b + k * SPAN), next);
        uint32_t fragment[4];
        for (int i = 0; i < 4; ++i) {
            int at = (k + 2 * t + i / 2 * 8) * 64 + g + i % 2 * 8;
            fragment[i] = numbers[at] | static_cast<uint32_t>(numbers[at + 64]) << 16;
        }
        warpgroup_fence();
        if constexpr (FROM_REGISTERS)
            warpgroup_multiply_add<true>(c, fragment, b_descriptor, T());
        else
            warpgroup_multiply_add<true>(c, matrix_descriptor_across<SPAN>(shared_address(a + k * SPAN), next),
                                         b_descriptor, T());
        warpgroup_commit();
        warpgroup_wait<0>();
    }
    for (int i = 0; i < N / 2; ++i) p.c[(g + i / 2 % 2 * 8) * N + i / 4 * 8 + 2 * t + i % 2] = c[i];
#endif
}

template <class T, int SPAN, bool FROM_REGISTERS>
void group_across_of(int n, const GroupProduct& p) {
    auto kernel = n == 64    ? group_across_kernel<T, 64, SPAN, FROM_REGISTERS>
                  : n == 128 ? group_across_kernel<T, 128, SPAN, FROM_REGISTERS>
                             : group_across_kernel<T, 256, SPAN, FROM_REGISTERS>;
    launch(kernel, 1, 128, p.k * 2 * (64 + n) + 8, Stream{}, p, "group_across");
}

void group_across(int dtype, Address a, Address b, Address c, int n, int k, int span, bool from_registers) {
    auto map = [&](Address base, int columns) {
        uint64_t row = static_cast<uint64_t>(2 * columns), height = static_cast<uint64_t>(k);
        uint32_t width = static_cast<uint32_t>(span / 2);
        return make_tensor_map(tensor_block(dtype, {row / 2, height, 1}, {2, row, row * height},
                                            {width, static_cast<uint32_t>(k), 1}, span), at<void>(base));
    };
    GroupProduct p{map(a, 64), map(b, n), at<void>(a), at<float>(c), k};
    auto product = [&](auto type) {
        using T = decltype(type);
        if (span == 32)
            from_registers ? group_across_of<T, 32, true>(n, p) : group_across_of<T, 32, false>(n, p);
        else
            from_registers ? group_across_of<T, 128, true>(n, p) : group_across_of<T, 128, false>(n, p);
    };
    dtype == int(Dtype::f16) ? product(half{}) : product(bfloat16{});
}

// out[r] = x[r] + y[r], rows of 128 numbers: x comes by the copy engine, y by copies of 32 threads of a producer, and
// two warps consume. `mistake` leaves out what it names.
enum class Mistake : int { none, wait_for_empty, wait_for_full, arrive_at_empty, expect_all };
struct Pipeline {
    TensorMap x_map;
    const float* y;
    float* out;
    int rounds;
    Mistake mistake;
};
VK_KERNEL(96, 1) pipeline_kernel(VK_GRID_CONSTANT Pipeline p) {
#if VK_SM90A
    constexpr int STAGES = 2, ROW = 128, BYTES = 4 * ROW;
    float* stages = reinterpret_cast<float*>(shared_memory());
    Barrier *full = reinterpret_cast<Barrier*>(shared_memory() + STAGES * 2 * BYTES), *empty = full + STAGES;
    int thread = thread_index();
    if (thread == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + s, 1 + 32);
            barrier_init(empty + s, 64);
        }
        barrier_init_done();
    }
    sync_block();
    for (int r = 0; r < p.rounds; ++r) {
        int s = r % STAGES;
        uint32_t parity = r / STAGES & 1;
        float *x = stages + s * 2 * ROW, *y = x + ROW;
        if (thread < 32) {
            if (p.mistake != Mistake::wait_for_empty) barrier_wait(empty + s, parity ^ 1);
            if (thread == 0) {
                barrier_expect(full + s, p.mistake == Mistake::expect_all ? BYTES / 2 : BYTES);
                copy_tensor(x, &p.x_map, full + s, 0, r, 0);
            }
            copy_async<16>(y + 4 * thread, p.y + r * ROW + 4 * thread);
            barrier_arrive_after_copies(full + s);
        } else {
            if (p.mistake != Mistake::wait_for_full) barrier_wait(full + s, parity);
            for (int i = thread - 32; i < ROW; i += 64) p.out[r * ROW + i] = x[i] + y[i];
            if (p.mistake != Mistake::arrive_at_empty) barrier_arrive(empty + s);
        }
    }
#endif
}

void pipeline(Address x, Address y, Address out, int rounds, int mistake) {
    uint64_t rows = static_cast<uint64_t>(rounds);
    TensorBlock t = tensor_block(int(Dtype::f32), {128, rows, 1}, {4, 512, 512}, {128, 1, 1}, 0);
    Pipeline p{make_tensor_map(t, at<void>(x)), at<float>(y), at<float>(out), rounds, static_cast<Mistake>(mistake)};
    launch(pipeline_kernel, 1, 96, 2 * 1024 + 32, Stream{}, p, "pipeline");
}

// out[block, r] = x[r], rows of 128 numbers, of which each block of a cluster brings its part for all. `mistake` leaves out
// what it names, or names a block that there is not.
enum class ClusterMistake : int { none, sync_first, sync_last, arrive_at_all, rank, blocks };
struct InCluster {
    TensorMap x_map;
    float* out;
    int rounds, blocks;
    ClusterMistake mistake;
};
VK_KERNEL(64, 1) cluster_kernel(VK_GRID_CONSTANT InCluster p) {
#if VK_SM90A
    constexpr int STAGES = 2, ROW = 128, BYTES = 4 * ROW;
    float* stages = reinterpret_cast<float*>(shared_memory());
    Barrier *full = reinterpret_cast<Barrier*>(shared_memory() + STAGES * BYTES), *empty = full + STAGES;
    int thread = thread_index(), rank = static_cast<int>(block_index()) % p.blocks, part = ROW / p.blocks;
    bool at_all = p.mistake != ClusterMistake::arrive_at_all;
    if (thread == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, at_all ? 32 * p.blocks : 32);
        }
        barrier_init_done();
    }
    sync_block();
    if (p.mistake != ClusterMistake::sync_first) sync_cluster();
    for (int r = 0; r < p.rounds; ++r) {
        int s = r % STAGES;
        uint32_t parity = r / STAGES & 1;
        float* x = stages + s * ROW;
        if (thread == 0) {
            barrier_wait(empty + s, parity ^ 1);
            barrier_expect(full + s, BYTES);
            copy_tensor_to_all(x + rank * part, &p.x_map, full + s,
                               p.blocks + (p.mistake == ClusterMistake::blocks), rank * part, r, 0);
        } else if (thread >= 32) {
            barrier_wait(full + s, parity);
            for (int i = thread - 32; i < ROW; i += 32) p.out[(block_index() * p.rounds + r) * ROW + i] = x[i];
            if (!at_all) barrier_arrive(empty + s);
            for (int other = 0; other < p.blocks && at_all; ++other)
                barrier_arrive(empty + s, other + (p.mistake == ClusterMistake::rank));
        }
    }
    if (p.mistake != ClusterMistake::sync_last) sync_cluster();
#endif
}

void cluster(Address x, Address out, int rounds, int blocks, int clusters, int mistake) {
    uint64_t rows = static_cast<uint64_t>(rounds);
    uint32_t part = static_cast<uint32_t>(128 / blocks);
    TensorBlock t = tensor_block(int(Dtype::f32), {128, rows, 1}, {4, 512, 512}, {part, 1, 1}, 0);
    InCluster p{make_tensor_map(t, at<void>(x)), at<float>(out), rounds, blocks, static_cast<ClusterMistake>(mistake)};
    launch(cluster_kernel, blocks * clusters, 64, 1024 + 32, Stream{}, p, "cluster", blocks);
}

// out[block, i] = the sum of x[other, i] over the blocks of its cluster, 128 numbers each. `mistake`: without the first
// meeting, without the last, an address that is none of 16 bytes, a block that there is not.
struct Peers {
    const float* x;
    float* out;
    int blocks, mistake;
};
VK_KERNEL(32, 1) peers_kernel(VK_GRID_CONSTANT Peers p) {
#if VK_SM90A
    float* mine = reinterpret_cast<float*>(shared_memory()) + 4 * thread_index();
    int64_t at = block_index() * 128 + 4 * thread_index();
    float sums[4] = {};
    for (int i = 0; i < 4; ++i) mine[i] = p.x[at + i];
    if (p.mistake != 1) sync_cluster();
    for (int rank = 0; rank < p.blocks; ++rank) {
        uint32_t words[4];
        read_words_of(rank + (p.mistake == 4), mine + (p.mistake == 3), words);
        for (int i = 0; i < 4; ++i) sums[i] += from_bits(words[i]);
    }
    for (int i = 0; i < 4; ++i) p.out[at + i] = sums[i];
    if (p.mistake != 2) sync_cluster();
#endif
}

void peers(Address x, Address out, int blocks, int clusters, int mistake) {
    launch(peers_kernel, blocks * clusters, 32, 512, Stream{}, Peers{at<float>(x), at<float>(out), blocks, mistake},
           "peers", blocks);
}

// n / divisor for n = first, first + step, … ; the count of those that are wrong
int64_t wrong_divisions(int64_t divisor, int64_t first, int64_t step, int64_t count) {
    Divisor d(divisor);
    int64_t wrong = 0;
    for (int64_t i = 0, n = first; i < count && n <= std::numeric_limits<int32_t>::max(); ++i, n += step)
        wrong += d.div(static_cast<uint32_t>(n)) != n / divisor || d.mod(static_cast<uint32_t>(n)) != n % divisor;
    return wrong;
}

#if !defined(__CUDACC__)

// A driver that answers with `result` where it has a context, and counts how often one is bound
struct Answering {
    int result;
    bool context, binds;
    int bound = 0;

    bool has_context() const { return context; }
    void bind_context() { ++bound, context = binds; }
    int encode(TensorMap&, const TensorBlock&, const void*) const { return context ? result : 201; }
    std::string name_of(int code) const { return "CODE (" + std::to_string(code) + ")"; }
};

int bound_for_a_map(int result, bool context, bool binds) {
    alignas(16) static const float x[64] = {};
    Answering driver{result, context, binds};
    make_tensor_map(tensor_block(int(Dtype::f32), {64, 1, 1}, {4, 256, 256}, {8, 1, 1}, 0), x, driver);
    return driver.bound;
}

// Conversions, all on arrays
void convert(int dtype, bool to, Address in, Address out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (dtype == int(Dtype::f16)) {
            if (to) at<float>(out)[i] = to_float(at<half>(in)[i]);
            else at<half>(out)[i] = from_float<half>(at<float>(in)[i]);
        } else if (dtype == int(Dtype::bf16)) {
            if (to) at<float>(out)[i] = to_float(at<bfloat16>(in)[i]);
            else at<bfloat16>(out)[i] = from_float<bfloat16>(at<float>(in)[i]);
        } else {
            at<uint32_t>(out)[i] = to_tf32(at<float>(in)[i]);
        }
    }
}

struct Out {
    alignas(16) float* out;
};

Barrier* a_barrier() { return reinterpret_cast<Barrier*>(shared_memory() + 32768); }

// c = zeros·bᵀ with the operand at b: [columns, k], or ACROSS [k, columns] with `next` bytes between blocks of columns
template <int COLUMNS, bool ACROSS>
void multiply_zeros(const char* b, bool fenced = true, bool waits = true, int next = 0) {
    float c[COLUMNS] = {};
    uint32_t a[4] = {};
    if (fenced) warpgroup_fence();
    uint32_t at = shared_address(b);
    warpgroup_multiply_add<ACROSS>(
        c, a, ACROSS ? matrix_descriptor_across<128>(at, next) : matrix_descriptor<128>(at), half());
    if (fenced) warpgroup_commit();
    if (waits) warpgroup_wait<0>();
}

void multiply_stores(Out p, bool visible) {
    if (thread_index() == 0) {
        std::memset(shared_memory(), 0, 8192);
        if (visible) barrier_init_done();
    }
    sync_block();
    float c[32] = {};
    uint32_t a[4] = {};
    warpgroup_fence();
    warpgroup_multiply_add(c, a, matrix_descriptor<128>(shared_address(shared_memory())), half());
    warpgroup_commit();
    p.out[2 * thread_index()] = c[0];
    warpgroup_wait<0>();
    p.out[2 * thread_index() + 1] = c[0];
}

// 128 threads with 32 KB and a barrier; c is that of mmas on 8 KB of zeros in front
struct Sample {
    const char* name;
    void (*kernel)(Out);
};

const Sample SAMPLES[] = {
    {"deadlock",
     [](Out) {
         if (thread_index() < 32)
             sync_some(1, 64);
         else
             sync_block();
     }},
    {"deadlock_at_barrier",
     [](Out) {
         if (thread_index() == 0) barrier_init(a_barrier(), 2);
         sync_block();
         if (thread_index() < 33) barrier_wait(a_barrier(), 0);
     }},
    {"divergence",
     [](Out) {
         if (thread_index() % 32 == 7)
             shuffle(1, 0);
         else
             sync_warp();
     }},
    {"returned_lane",
     [](Out) {
         if (thread_index() != 3) sync_warp();
     }},
    {"returned_threads_are_no_matter", [](Out) { if (thread_index() < 40) sync_block(); }},
    {"write_behind", [](Out) { shared_memory()[32776 + thread_index()] = 1; }},
    {"write_in_front", [](Out) { shared_memory()[-1] = 1; }},
    {"misaligned_copy", [](Out p) { copy_async<16>(shared_memory() + 4, p.out); }},
    {"misaligned_source", [](Out p) { copy_async<8>(shared_memory(), p.out + 1); }},
    {"copy_outside", [](Out p) { copy_async<16>(shared_memory() + 32768, p.out); }},
    {"copy_never_waited_for",
     [](Out p) {
         copy_async<16>(shared_memory(), p.out);
         copy_commit();
     }},
    {"barrier_not_initialised", [](Out) { barrier_arrive(a_barrier()); }},
    {"barrier_overwritten",
     [](Out) {
         if (thread_index()) return;
         barrier_init(a_barrier(), 1);
         shared_memory()[32768] = 1;
         barrier_arrive(a_barrier());
     }},
    {"one_arrival_too_many",
     [](Out) {
         if (thread_index()) return;
         barrier_init(a_barrier(), 1);
         barrier_init_done();
         barrier_expect(a_barrier(), 16);
         barrier_arrive(a_barrier());
     }},
    {"no_fence", [](Out) { multiply_zeros<32, false>(shared_memory(), false, false); }},
    {"product_never_waited_for", [](Out) { multiply_zeros<32, false>(shared_memory(), true, false); }},
    {"warps_of_a_group_differ",
     [](Out) { multiply_zeros<32, false>(shared_memory() + (thread_index() >= 96 ? 8192 : 0)); }},
    {"operand_outside", [](Out) { multiply_zeros<128, false>(shared_memory() + 8192); }},
    {"operand_across_outside", [](Out) { multiply_zeros<128, true>(shared_memory(), true, true, 14336); }},
    {"operand_across_inside_a_pattern", [](Out) { multiply_zeros<32, true>(shared_memory() + 512, true, true, 8192); }},
    // Their output shows them: c before and after the wait, of operands that the copy engine did not write, or did
    {"products_of_stores", [](Out p) { multiply_stores(p, false); }},
    {"products_of_stores_behind_a_fence", [](Out p) { multiply_stores(p, true); }},
};

void sample(const std::string& name, Address out) {
    for (const Sample& s : SAMPLES)
        if (name == s.name) return launch(s.kernel, 1, 128, 32768 + 8, Stream{}, Out{at<float>(out)}, name);
    throw std::invalid_argument("no sample " + name);
}

#endif

}  // namespace

PYBIND11_MODULE(VITKERNELS_MODULE, m) {
    py::register_local_exception<Refused>(m, "Refused", PyExc_RuntimeError);
    m.def("product", product);
    m.def("matrices", matrices);
    m.def("copies", copies);
    m.def("sum", sum);
    m.def("turn", turn);
    m.def("fetch", [](int dtype, const std::vector<uint64_t>& sizes, const std::vector<uint64_t>& strides,
                      const std::vector<uint32_t>& block, int swizzle, Address base, const std::vector<int>& where,
                      Address out) { fetch(tensor_block(dtype, sizes, strides, block, swizzle), base, where, out); });
    m.def("put", put);
    m.def("group_product", group_product);
    m.def("group_across", group_across);
    m.def("pipeline", pipeline);
    m.def("cluster", cluster);
    m.def("peers", peers);
    m.def("wrong_divisions", wrong_divisions);
#if !defined(__CUDACC__)
    m.def("bound_for_a_map", bound_for_a_map, py::arg("result"), py::arg("context"), py::arg("binds"));
    m.def("convert", convert);
    m.def("sample", sample);
#endif
}
