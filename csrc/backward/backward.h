// The backward: what bindings.cpp plans and runs. Kernels: backward_weight.cuh (dW = dYᵀ·patches, without a matrix of
// patches; hopper_weight.cuh on sm_90a), backward_images.cuh (dX = dY·W, every pixel written once), backward_sums.cuh
// (the sums of dY over images).
// No atomics: sums that are split leave their parts in scratch memory, and finish_kernel adds them in order.
#pragma once

#include <string>

#include "backward/plan.h"

namespace vk {

struct BackwardTensors {  // data == nullptr: absent; a gradient that is absent is not asked for
    Tensor grad;      // [B, T + rows, D], dY
    Tensor images;    // [B, C, F, H, W]
    Tensor weight;    // [D, C, P_t, P_h, P_w]
    Tensor keep;      // [B, rows], integers
    Tensor centred;   // [2, C], contiguous, of sums: m and a of y = (x − m)·a; absent where pixels are as they are
    Tensor d_images;  // as images
    Tensor d_weight;  // as weight
    Tensor d_bias;    // [D]
    Tensor d_pos;     // [1, pos_rows, D]
    Tensor d_prefix;  // [1, T, D]
    void* scratch;    // Backward::scratch_bytes, aligned to 256
};

struct Backward {
    int64_t scratch_bytes;
    bool indexed;                // whether kept patches are looked up by their place in the grid
    bool has_weight, has_sums, has_images;
    backward::WeightPlan weight;
    backward::SumsPlan sums;
    backward::ImagesPlan images;
    // In scratch, bytes from its beginning:
    int64_t weight_parts;        // [splits, D, K] of sums
    int64_t table_parts;         // [splits, table_rows, D] of sums
    int64_t bias_parts;          // [splits·blocks, D] of sums
    int64_t packed;              // weight of images_kernel, of the product's type
    int64_t heads, nexts;        // [B, N] and [B, rows], int32
};

std::string backward_refused(const Problem& p);  // why not, with the numbers; empty: it can be run
Backward plan_backward(const Problem& p, const Gpu& gpu, const BackwardTensors& t);  // reads no data
void run_backward(const Problem& p, const Backward& plan, const BackwardTensors& t, Stream stream);

}  // namespace vk
