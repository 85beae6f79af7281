// Driver of csrc/driver.h, for a CPU: as on a GPU, a thread has no context until one is bound to it, and without one no
// map is made. VITKERNELS_HOST_DRIVER, in the environment, is the CUresult that is answered instead of a map.
#pragma once

#include <cstdlib>
#include <string>

#include "common/tensor_map.h"

namespace vk {

struct Driver {
    static constexpr int INVALID_CONTEXT = 201;

    static Driver& loaded() {
        static thread_local Driver driver;
        return driver;
    }

    bool has_context() const { return bound; }
    void bind_context() { bound = true; }

    int encode(TensorMap& map, const TensorBlock& t, const void* base) const {
        if (!bound) return INVALID_CONTEXT;
        if (const char* answer = std::getenv("VITKERNELS_HOST_DRIVER")) return std::atoi(answer);
        map.base = static_cast<const char*>(base);
        map.dtype = t.dtype;
        map.rank = t.rank;
        map.swizzle = t.swizzle;
        for (int i = 0; i < 5; ++i) {
            bool real = i < t.rank;
            map.sizes[i] = real ? t.sizes[i] : 1;
            map.strides[i] = real ? t.strides[i] : 0;
            map.block[i] = real ? t.block[i] : 1;
        }
        return SUCCESS;
    }

    std::string name_of(int result) const { return "CUresult (" + std::to_string(result) + ")"; }

private:
    bool bound = false;
};

}  // namespace vk
