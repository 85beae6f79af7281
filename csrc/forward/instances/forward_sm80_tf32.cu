#include "forward/sm80.cuh"

void vk::forward_sm80_tf32(const ForwardLaunch& l) { launch_loader<tf32>(l); }
