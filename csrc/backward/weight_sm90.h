// The road of sm_90a to the weight's gradient, launched: declared here, defined where its kernels are instantiated.
#pragma once

#include "backward/plan.h"

namespace vk::backward {

struct HopperWeightLaunch {
    const Problem& p;
    const WeightPlan& plan;
    const Tensor& images;  // [B, C, F, H, W]
    const Tensor& grad;    // [B, T + rows, D]
    const float* centred;  // [2, C]; null: pixels as they are
    float* parts;          // [splits, D, K]
    Stream stream;
};

void hopper_weight_f16(const HopperWeightLaunch&);
void hopper_weight_bf16(const HopperWeightLaunch&);

}  // namespace vk::backward
