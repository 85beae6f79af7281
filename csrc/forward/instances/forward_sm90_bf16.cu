#include "forward/sm90.cuh"

void vk::forward_sm90_bf16(const ForwardLaunch& l) { launch_sm90<bfloat16>(l); }
