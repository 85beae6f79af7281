#include "forward/sm90.cuh"

namespace vk {

void hopper_bf16(const ForwardLaunch& l) { launch_hopper_road<bfloat16>(l); }

}  // namespace vk
