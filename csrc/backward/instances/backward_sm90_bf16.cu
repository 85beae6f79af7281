#include "backward/images_sm90.cuh"

void vk::backward::weight_sm90_bf16(const WgmmaWeightLaunch& l) { launch_weight_sm90<bfloat16>(l); }
void vk::backward::images_sm90_bf16(const WgmmaImagesLaunch& l) { launch_images_sm90<bfloat16>(l); }
