#include "forward/sm80.cuh"

namespace vk {

void forward_tf32(const ForwardLaunch& l) { launch_road<tf32>(l); }

}  // namespace vk
