#include "forward/sm90.cuh"

void vk::forward_sm90_f32(const ForwardLaunch& l) { launch_sm90<tf32x3>(l); }
