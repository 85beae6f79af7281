#include "forward/sm80.cuh"

namespace vk {

void forward_bf16(const ForwardLaunch& l) { launch_road<bfloat16>(l); }

}  // namespace vk
