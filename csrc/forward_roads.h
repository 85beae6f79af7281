// One road of the forward, launched: declared here, defined where its kernels are instantiated, a file for each kind of
// product so that they compile side by side.
#pragma once

#include "forward.h"
#include "launch.h"

namespace vk {

// `prefixes`: threads that write prefix tokens
struct ForwardLaunch {
    const Problem& p;
    const Forward& plan;
    ForwardArguments arguments;
    int64_t prefixes;
    Stream stream;
};

void forward_f16(const ForwardLaunch&);
void forward_bf16(const ForwardLaunch&);
void forward_tf32(const ForwardLaunch&);
void forward_f32(const ForwardLaunch&);
void forward_f64(const ForwardLaunch&);
void hopper_f16(const ForwardLaunch&);
void hopper_bf16(const ForwardLaunch&);

}  // namespace vk
