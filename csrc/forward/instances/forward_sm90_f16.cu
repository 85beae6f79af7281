#include "forward/sm90.cuh"

namespace vk {

void hopper_f16(const ForwardLaunch& l) { launch_hopper_road<half>(l); }

}  // namespace vk
