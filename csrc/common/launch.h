// Launching a kernel, and every return code of CUDA turned into an exception.
//
// On a CPU, for tests, the same `launch` runs the kernel's threads one after the other (tests/host/emulator.h).
#pragma once

#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/errors.h"
#include "common/problem.h"

namespace vk {

struct Early {  // what a launch waits for, wait_for_prerequisites(), where it first reads it
    const void* data;
    int64_t bytes;
};

}  // namespace vk

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace vk {

template <class Error = std::runtime_error>
void check(cudaError_t code, const std::string& what) {
    if (code == cudaSuccess) return;
    cudaGetLastError();  // so that it is not reported again, to somebody else
    throw Error("CUDA: " + std::string(cudaGetErrorName(code)) + ", " + cudaGetErrorString(code) + ": " + what);
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

// Earlier drivers can't capture a launch that begins early in a graph.
inline bool may_begin_early() {
    static const bool known = [] {
        int version = 0;
        return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
    }();
    return known;
}

// One launch; `what` is for the message of an error. A block may have more than 48 KB of shared memory. Where blocks are
// to run by `cluster`, there may be no room for one, as on a slice of a GPU: then another kernel can still be taken.
// With `early` it may begin while the launch before it, which says launch_dependents(), still fills that memory, and
// nothing else that is read here: it begins on what needs none of it.
template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes, Stream stream,
            const Arguments& arguments, const std::string& what, int cluster = 1, Early early = {}) {
    if (shared_bytes > 48 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel));
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t config{};
    config.attrs = attributes;
    if (cluster > 1) {
        cudaLaunchAttribute& by_cluster = attributes[config.numAttrs++];
        by_cluster.id = cudaLaunchAttributeClusterDimension;
        by_cluster.val.clusterDim.x = static_cast<unsigned>(cluster);
        by_cluster.val.clusterDim.y = by_cluster.val.clusterDim.z = 1;
    }
    if (early.bytes && may_begin_early()) {
        cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
        overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap.val.programmaticStreamSerializationAllowed = 1;
    }
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    cudaError_t code = cudaLaunchKernelEx(&config, kernel, arguments);
    if (code == cudaSuccess) return;
    std::string text = what + ", " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads, " +
                       std::to_string(shared_bytes) + " bytes of shared memory";
    if (cluster > 1) check<Refused>(code, text + ", by clusters of " + std::to_string(cluster));
    check(code, text);
}

}  // namespace vk

#else
#include "host/launch.h"
#endif
