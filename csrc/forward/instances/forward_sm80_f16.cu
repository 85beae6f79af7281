#include "forward/sm80.cuh"

void vk::forward_sm80_f16(const ForwardLaunch& l) { launch_loader<half>(l); }
