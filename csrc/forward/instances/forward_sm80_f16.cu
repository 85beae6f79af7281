#include "forward/sm80.cuh"

namespace vk {

void forward_f16(const ForwardLaunch& l) { launch_road<half>(l); }

}  // namespace vk
