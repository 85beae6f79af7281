// A launch of the forward, as vitkernels/backends/cuda/forward_plan.py plans it.
#pragma once

#include <string>

#include "common/problem.h"

namespace vk {

// How the patches come into shared memory (loaders.cuh)
enum class LoaderKind : int { gather, copy, rows, copied, stored, engine };

struct ForwardPlan {  // forward_plan.py says what its fields are
    LoaderKind loader;
    bool wgmma, pack;
    int BM, BN, step_k, steps, lag, stages, chunk, stage_rows, slot_bytes, segment_bytes, segments, block[3], group, cluster, splits;
    int a_bytes, b_pitch, stage_bytes, table_bytes, shared_bytes, weight_chunk, tf32_terms;
    int64_t weight_row, tiles_n, tiles, blocks;
    std::string how;

    int pair() const { return cluster / splits; }  // tiles of a cluster
};

inline constexpr int STAGING_PAD = 8;  // of a row of sums on its way through shared memory, against bank conflicts

}  // namespace vk
