#include "forward/sm80.cuh"

void vk::forward_sm80_bf16(const ForwardLaunch& l) { launch_loader<bfloat16>(l); }
