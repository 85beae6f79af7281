// Launching a kernel, and every return code of CUDA turned into an exception.
//
// On a CPU, for tests, the same `launch` runs the kernel's threads one after the other (tests/host/emulator.h).
#pragma once

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/problem.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace vk {

inline void check(cudaError_t code, const std::string& what) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // so that it is not reported again, to somebody else
    throw std::runtime_error("CUDA: " + std::string(cudaGetErrorName(code)) + ", " + cudaGetErrorString(code) + ": " +
                             what);
}

// Makes a device the current one while it lives; -1: the current one stays.
class OnDevice {
public:
    explicit OnDevice(int device) {
        int current = 0;
        if (device < 0) return;
        check(cudaGetDevice(&current), "cudaGetDevice");
        if (current == device) return;
        check(cudaSetDevice(device), "cudaSetDevice");
        before = current;
    }
    ~OnDevice() {
        if (before >= 0) cudaSetDevice(before);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before = -1;
};

// Lets the kernel have as much shared memory as the device has for a block: once, as it costs a microsecond.
inline void allow_shared_memory(const void* kernel) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> allowed;
    int device = 0, most = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    std::lock_guard<std::mutex> lock(mutex);
    if (allowed.count({kernel, device})) return;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
    allowed.insert({kernel, device});
}

// One launch; `what` is for the message of an error. A block may have more than 48 KB of shared memory.
template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes, Stream stream,
            const Arguments& arguments, const std::string& what) {
    if (shared_bytes > 48 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel));
    kernel<<<dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
    if (cudaError_t code = cudaGetLastError())
        check(code, what + ", " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads, " +
                        std::to_string(shared_bytes) + " bytes of shared memory");
}

}  // namespace vk

#else
#include "host/launch.h"
#endif
