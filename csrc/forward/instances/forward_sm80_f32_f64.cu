#include "forward/sm80.cuh"

namespace vk {

void forward_f32(const ForwardLaunch& l) { launch_plain<float>(l); }
void forward_f64(const ForwardLaunch& l) { launch_plain<double>(l); }

}  // namespace vk
