// The backward, as bindings.cpp runs it. Kernels: weight_sm80.cuh (dW = dYᵀ·patches, without a matrix of patches;
// weight_sm90.cuh on sm_90a), images.cuh (dX = dY·W, every pixel written once; images_sm90.cuh on sm_90a), reduce.cuh (the
// sums of dY over images).
// No atomics: sums that are split leave their parts in scratch memory, and finish_kernel adds them in order.
#pragma once

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
    void* scratch;    // what is planned, aligned to 256 bytes
};

// Launches what was planned on `stream`. Throws std::runtime_error with the problem in its text where CUDA reports an
// error.
void run_backward(const Problem& p, const backward::BackwardPlan& plan, const BackwardTensors& t, Stream stream);

}  // namespace vk
