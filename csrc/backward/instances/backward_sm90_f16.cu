#include "backward/weight_sm90.cuh"

namespace vk::backward {

void hopper_weight_f16(const HopperWeightLaunch& l) { launch_hopper_pixels<half>(l); }

}  // namespace vk::backward
