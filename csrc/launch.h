// Launching a kernel, and every return code of CUDA turned into an exception.
//
// On a CPU, for tests, the same `launch` runs the kernel's threads one after the other (tests/host/emulator.h).
#pragma once

#include <stdexcept>
#include <string>

#include "problem.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace vk {

inline void check(cudaError_t code, const std::string& what) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // so that it is not reported again, to somebody else
    throw std::runtime_error("CUDA: " + std::string(cudaGetErrorName(code)) + ", " + cudaGetErrorString(code) + ": " +
                             what);
}

// One launch; `what` is for the message of an error. A block may have more than 48 KB of shared memory.
template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes, Stream stream,
            const Arguments& arguments, const std::string& what) {
    std::string where = what + " (" + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads, " +
                        std::to_string(shared_bytes) + " bytes of shared memory)";
    if (shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), where);
    kernel<<<dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    check(cudaGetLastError(), where);
}

}  // namespace vk

#else
#include "host/launch.h"
#endif
