// The images' gradient on sm_90a, launched: declared here, defined where its kernels are instantiated.
#pragma once

#include "backward/plan.h"

namespace vk::backward {

struct WgmmaImagesLaunch {
    const Problem& p;
    const WgmmaImagesPlan& plan;
    const Tensor& grad;      // [B, T + rows, D]
    const void* weight;      // [D, weight_row], packed
    const float* centred;    // [2, C]; null: pixels as they are
    const Tensor& d_images;  // [B, C, F, H, W]
    Stream stream;
};

void images_sm90_f16(const WgmmaImagesLaunch&);
void images_sm90_bf16(const WgmmaImagesLaunch&);

}  // namespace vk::backward
