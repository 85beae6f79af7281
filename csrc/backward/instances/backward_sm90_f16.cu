#include "backward/images_sm90.cuh"

void vk::backward::weight_sm90_f16(const WgmmaWeightLaunch& l) { launch_weight_sm90<half>(l); }
void vk::backward::images_sm90_f16(const WgmmaImagesLaunch& l) { launch_images_sm90<half>(l); }
