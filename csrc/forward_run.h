// The forward as the bindings call it.
#pragma once

#include "forward.h"

namespace vk {

// Launches what `plan_forward` planned on `stream`. Throws std::runtime_error with the problem in its text where CUDA
// reports an error. The tokens must not be empty.
void run_forward(const Problem& p, const Forward& f, const ForwardTensors& t, Stream stream);

// Where these kernels run, as PyTorch names devices: "cuda", or "cpu" where tests emulate them.
const char* device_type();

}  // namespace vk
