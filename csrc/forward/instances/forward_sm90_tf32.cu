#include "forward/sm90.cuh"

void vk::forward_sm90_tf32(const ForwardLaunch& l) { launch_sm90<tf32>(l); }
