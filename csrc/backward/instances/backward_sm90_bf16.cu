#include "backward/weight_sm90.cuh"

namespace vk::backward {

void hopper_weight_bf16(const HopperWeightLaunch& l) { launch_hopper_pixels<bfloat16>(l); }

}  // namespace vk::backward
