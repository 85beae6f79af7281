// The weight's gradient on sm_90a, launched: declared here, defined where its kernels are instantiated.
#pragma once

#include "backward/plan.h"

namespace vk::backward {

struct WgmmaWeightLaunch {
    const Problem& p;
    const WeightPlan& plan;
    const Tensor& images;  // [B, C, F, H, W]
    const Tensor& grad;    // [B, T + rows, D]
    int64_t T;             // 0 of copies, which are of patches alone
    const Tensor& keep;    // [B, rows]
    const float* centred;  // [2, C]; null: pixels as they are
    float* parts;          // [splits, D, K]
    bool more;             // they are added to those that are there
    Stream stream;
};

void weight_sm90_f16(const WgmmaWeightLaunch&);
void weight_sm90_bf16(const WgmmaWeightLaunch&);

}  // namespace vk::backward
