#include "forward/sm90.cuh"

void vk::forward_sm90_f16(const ForwardLaunch& l) { launch_sm90<half>(l); }
