#include "forward/sm80.cuh"

void vk::forward_sm80_f32(const ForwardLaunch& l) { launch_plain<float>(l); }
void vk::forward_sm80_f64(const ForwardLaunch& l) { launch_plain<double>(l); }
