// A block of CUDA threads on a CPU: what primitives.h calls (emulator.cpp has it).
//
// Every thread is a fiber that runs until it must meet others. Which goes first is drawn for each block from a seed
// (VITKERNELS_HOST_SEED in the environment, 1 without), and shared memory is NaN until it is written, so that a missing
// barrier shows. Blocks run one after the other, those of a cluster in turns. What may happen late does: copies land when
// a thread waits for them and nothing else can run (in half of the blocks the copy engine's land at once, and there some
// warps run only where no other can), products of a warpgroup are there when it has waited for them, and until then NaN
// is in their place. The copy engine reads what it stores at once or when a thread waits for that, and of what a thread
// has written only what it has fenced since.
#pragma once

#include <cstdint>
#include <string>

#include "common/problem.h"

namespace vk {

// What the copy engine knows of a tensor: the host's stand-in for CUtensorMap (driver.h fills it).
struct alignas(64) TensorMap {
    const char* base;
    Dtype dtype;
    int rank;
    uint64_t sizes[5], strides[5];
    uint32_t block[5];
    int swizzle;
};

using Barrier = uint64_t;

namespace host {

struct Here {  // of the thread that runs now
    int thread;
    int64_t block, blocks;
    char* shared;
};
extern Here here;

[[noreturn]] void fail(const std::string& message);  // ends the launch with std::runtime_error

uint32_t shared_address(const void* p);

void wait_for_prerequisites();
void sync(int id, int threads);  // id 0: all threads of the block
void sync_cluster();             // of all blocks of the cluster, but for those that have returned
void read_words_of(int rank, const void* p, uint32_t* words);
void sync_warp(const char* name);
uint64_t shuffle(uint64_t value, int lane);

void copy_async(void* shared, const void* global, int bytes, int real);
void copy_commit();
void copy_wait(int pending);

void load_matrices(uint32_t* r, const void* row, bool transposed);
void multiply_add(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Dtype type);

void barrier_init(Barrier* barrier, int count);
void barrier_init_done();
void barrier_arrive(Barrier* barrier);
void barrier_arrive(Barrier* barrier, int rank);  // at that of a block of the cluster
void barrier_expect(Barrier* barrier, int bytes);
void barrier_arrive_after_copies(Barrier* barrier);
void barrier_wait(const Barrier* barrier, uint32_t phase);

void copy_tensor(void* shared, const TensorMap* map, Barrier* barrier, int rank, const int (&at)[5]);
// To the same place of every block of the cluster, each of which counts the bytes at its own barrier
void copy_tensor_to_all(void* shared, const TensorMap* map, Barrier* barrier, int blocks, int rank, const int (&at)[5]);
void fence_copy_engine();
void store_tensor(const TensorMap* map, const void* shared, int rank, const int (&at)[5]);
void stores_commit();
void stores_wait(int pending);
void store_matrices(void* row, const uint32_t* r);
void store_pair(void* to, float low, float high);
void check_map(const TensorMap* map, int rank, const char* what);

void warpgroup_fence();
void warpgroup_commit();
void warpgroup_wait(int pending);
// c has columns / 2 numbers; `a` is null where the descriptor `a_shared` tells where A lies. `across`: what is in
// shared memory has k outermost.
void warpgroup_multiply_add(float* c, int columns, const uint32_t* a, uint64_t a_shared, uint64_t b, Dtype type,
                            bool across, bool a_across);

// All clusters, one after the other; `call` runs one thread. What is early is NaN for each of the first until it has waited.
void run(void (*call)(const void* kernel, const void* arguments), const void* kernel, const void* arguments,
         int64_t blocks, int threads, int shared_bytes, int cluster, const std::string& what, void* early,
         int64_t early_bytes);

}  // namespace host
}  // namespace vk
